# Completion of stages, keys and files: eval "$(video-mae --completion)" in ~/.bashrc; in ~/.zshrc after autoload -U bashcompinit && bashcompinit.
_video_mae() {
    local IFS=$'\n' found="" stage=("${COMP_WORDS[1]}") word=${COMP_WORDS[COMP_CWORD]}
    if [[ $COMP_CWORD -eq 1 ]]; then
        found=$(video-mae | sed -n 's/^  \([a-z]*\) .*/\1/p' | uniq)
    elif [[ ${COMP_WORDS[COMP_CWORD - 1]} != "=" ]]; then # what follows it is a value
        if [[ ${stage[0]} == bench && $COMP_CWORD -eq 2 ]]; then
            found=$'kernels\nstep\ndata\n' # bench alone is the first of them, whose keys follow
        elif [[ ${stage[0]} == bench && ${COMP_WORDS[2]} == [a-z]* ]]; then
            stage+=("${COMP_WORDS[2]}")
        fi
        found+=$(video-mae "${stage[@]}" --help all 2>/dev/null | sed -n 's/^  \([A-Za-z_.]*\) = .*/\1=/p')
    fi
    COMPREPLY=($(compgen -W "$found" -- "$word"))
    # files beside keys; where there are none, the shell completes files in its own way
    if [[ $COMP_CWORD -gt 1 && ${#COMPREPLY[@]} -gt 0 ]]; then COMPREPLY+=($(compgen -f -- "$word")); fi
    if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace; fi
}
complete -o default -F _video_mae video-mae
