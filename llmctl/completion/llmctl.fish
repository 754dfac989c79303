# llmctl completion for fish. Made by `llmctl completion fish`.
function __llmctl_complete
    set -l program (string replace -r '^~(?=/)' $HOME -- (commandline -opc)[1])
    set -lx _LLMCTL_COMPLETE fish_complete
    set -lx _LLMCTL_LINE (commandline -cp | string collect)
    for line in ($program 2>/dev/null)
        set -l parts (string split -m 2 \t -- $line)
        switch $parts[1]
            case plain
                printf '%s\t%s\n' $parts[2] $parts[3]
            case file
                __fish_complete_path (commandline -ct)
            case dir
                __fish_complete_directories (commandline -ct) ''
        end
    end
end
complete --command llmctl --no-files --keep-order --arguments '(__llmctl_complete)'
