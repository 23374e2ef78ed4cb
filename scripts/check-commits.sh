#!/usr/bin/env bash
# Checks the messages of all commits since the rule exists: the subject has at most 72 characters and begins with the room that the
# commit changes ("qemu: "), and a body gives the reason. Exits 77, which means skipped, where the history is not complete.
set -euo pipefail
cd "$(dirname "$0")/.."

# The first commit that follows the rule has this parent.
SINCE=7b04836
MAX_SUBJECT=72
ROOM='[a-z][a-z0-9/-]*'

if ! git merge-base --is-ancestor "$SINCE" HEAD 2> /dev/null; then
    echo "the history back to $SINCE is missing, so no message is checked" >&2
    exit 77
fi

bad=0
complain() {
    echo "error: commit ${1:0:12}: $2" >&2
    bad=1
}

for commit in $(git rev-list --no-merges "$SINCE..HEAD"); do
    subject=$(git log -1 --format=%s "$commit")
    [ "${#subject}" -le "$MAX_SUBJECT" ] || complain "$commit" "the subject has ${#subject} characters; at most $MAX_SUBJECT are allowed: $subject"
    [[ $subject =~ ^$ROOM(,\ $ROOM)*:\ [^\ ] ]] || complain "$commit" "the subject begins with no room, as in \"qemu: retry the power button\": $subject"
    [ -n "$(git log -1 --format=%b "$commit")" ] || complain "$commit" "a body is missing that gives the reason: $subject"
done
exit "$bad"
