"""How text becomes ids: readers, tokenizer, chat template, token shards. Free of torch."""
