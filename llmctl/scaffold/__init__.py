"""New projects from templates: what `llmctl plugins new` writes."""
