#compdef llmctl
# llmctl completion for zsh. Made by `llmctl completion zsh`.
_llmctl() {
    local -a values shown suffix
    local line kind value text
    for line in "${(@f)$(_LLMCTL_COMPLETE=zsh_complete _LLMCTL_LINE="${(j: :)words[1,CURRENT]}" \
        ${~${(Q)words[1]}} 2>/dev/null)}"; do
        kind=${line%%$'\t'*} line=${line#*$'\t'}
        value=${line%%$'\t'*} text=${line#*$'\t'}
        case $kind in
            plain) values+=("$value") shown+=("$text") ;;
            file) compset -P '*='; _files ;;
            dir) compset -P '*='; _files -/ ;;
            nospace) suffix=(-S '') ;;
        esac
    done
    (( $#values )) && compadd $suffix -V llmctl -l -d shown -a values
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    _llmctl "$@"
else
    compdef _llmctl llmctl
fi
