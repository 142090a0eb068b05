#!/bin/sh
# A handler in a shell script: JSON text on standard input, JSON on standard output.
#
#   latzero serve textstat -- examples/textstat.sh
#   latzero call textstat '"some text"'
set -eu
text=$(cat)
case $text in
  '"'*'"') ;;
  *) echo "expected a JSON string, got: $text" >&2; exit 64 ;;
esac
# Without the surrounding quotes. Escapes are counted as characters, which is enough for an example.
text=${text#?}
text=${text%?}
words=$(printf '%s' "$text" | wc -w | tr -d ' ')
printf '{"words":%s,"characters":%s}\n' "$words" "${#text}"
