# llmctl completion for bash, 4.4 or newer. Made by `llmctl completion bash`.
_llmctl_completion() {
    local type value
    COMPREPLY=()
    # The line itself, not COMP_WORDS: there `=` and `:` end a word, and ids such as sft[lr=3e-5] hold them.
    while IFS=$'\t' read -r type value; do
        case $type in
            plain) COMPREPLY+=("$value") ;;
            file) compopt -o default ;;
            dir) compopt -o dirnames ;;
            nospace) compopt -o nospace ;;
        esac
    done < <(_LLMCTL_COMPLETE=bash_complete _LLMCTL_LINE="${COMP_LINE:0:COMP_POINT}" _LLMCTL_WORD="$2" \
        "${1/#\~/$HOME}" 2>/dev/null)
}
complete -o nosort -F _llmctl_completion llmctl
