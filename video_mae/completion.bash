# Completion of stages and keys: eval "$(video-mae --completion)" in ~/.bashrc; in ~/.zshrc after autoload -U bashcompinit && bashcompinit.
_video_mae() {
    local found word=${COMP_WORDS[COMP_CWORD]}
    if [[ $COMP_CWORD -eq 1 ]]; then
        found=$(video-mae | sed -n 's/^  \([a-z]*\)  .*/\1/p')
    else
        # files where nothing is found: a word, or the value of a key
        found=$(video-mae "${COMP_WORDS[1]}" --help all 2>/dev/null | sed -n 's/^  \([A-Za-z_.]*\) = .*/\1=/p')
    fi
    mapfile -t COMPREPLY < <(compgen -W "$found" -- "$word")
    if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace; fi
}
complete -o default -F _video_mae video-mae
