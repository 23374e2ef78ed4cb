#!/bin/bash
# Gives each CHCP_ variable of the predecessor its UNKEY_VMCP_ name.
#
#   source scripts/migrate-env.sh     sets the new variables in this shell
#   scripts/migrate-env.sh            shows what would be set; its exports end with it
#
# `vmm-controlplane migrate-env` prints the same as export lines, to be evaluated or kept in a file.
#
# The old variables stay set and are copied to chcp-backup.env in the current directory. A backup that exists is never overwritten:
# the next free name is used. A new variable that is already set is not changed.
#
# If the script is sourced, it runs in an interactive shell, which may be dash or zsh, or have nounset or errexit on. The script
# therefore uses POSIX only, calls no `exit`, changes no options, and leaves nothing but the exports.

_vmcp_backup() {
    _vmcp_old=$(env | grep '^CHCP_') || :
    if [ -z "$_vmcp_old" ]; then
        echo "No CHCP_ variable is set: nothing to back up."
        return 0
    fi
    _vmcp_file=chcp-backup.env
    _vmcp_n=0
    # The name is used only if nothing has it (noclobber), not even a link. The copy is readable by its owner only.
    until (umask 077 && set -C && printf '%s\n' "$_vmcp_old" >"$_vmcp_file") 2>/dev/null; do
        if [ -f "$_vmcp_file" ] && [ "$(cat "$_vmcp_file" 2>/dev/null)" = "$_vmcp_old" ]; then
            return 0
        fi
        _vmcp_n=$((_vmcp_n + 1))
        if [ "$_vmcp_n" -gt 99 ]; then
            echo "Could not write chcp-backup.env here: going on without a backup (the old variables stay set)." >&2
            return 0
        fi
        _vmcp_file=chcp-backup.env.$_vmcp_n
    done
    [ "$_vmcp_n" -eq 0 ] || echo "chcp-backup.env holds something else: backed up to $_vmcp_file"
}

# Gives one variable its new name: $1 is the part after the prefix.
_vmcp_migrate() {
    eval "_vmcp_old=\${CHCP_$1-} _vmcp_new=\${UNKEY_VMCP_$1-} _vmcp_short=\${VMCP_$1-}"
    if [ -z "$_vmcp_old" ]; then
        return 0
    fi
    if [ -n "$_vmcp_new" ] && [ "$_vmcp_new" != "$_vmcp_old" ]; then
        echo "Kept UNKEY_VMCP_$1, which is already set (CHCP_$1 is no longer read)"
    elif [ -z "$_vmcp_new" ] && [ -n "$_vmcp_short" ]; then
        echo "Kept VMCP_$1, which is already set (CHCP_$1 is no longer read)"
    else
        export "UNKEY_VMCP_$1=$_vmcp_old"
        echo "Migrated CHCP_$1 -> UNKEY_VMCP_$1"
    fi
}

echo "Migrating VMM Control Plane environment variables..."
_vmcp_backup

for _vmcp_name in PORT ADDRESS CH_ENDPOINT SOCKET SOCKET_MODE SOCKET_GROUP TLS_CERT TLS_KEY TLS_CLIENT_CA \
    ALLOWED_HOSTS CORS_ORIGINS BACKEND FC_ENDPOINT QEMU_ENDPOINT CH_BINARY FC_BINARY QEMU_BINARY \
    QEMU_KVM QEMU_IMPORT DEFAULT_KERNEL DEFAULT_INITRD DEFAULT_KERNEL_ARGS METRICS_INTERVAL \
    EVENT_RETENTION CONSOLE_HISTORY SPARE_VMMS STATE_DIR RUNTIME_DIR OTEL_ENABLED OTEL_SERVICE_NAME OTEL_SERVICE_VERSION \
    OTEL_SAMPLING_RATE OTEL_ENDPOINT OTEL_PROMETHEUS_ENABLED OTEL_PROMETHEUS_PORT \
    OTEL_PROMETHEUS_VMS; do
    _vmcp_migrate "$_vmcp_name"
done

if [ -z "${UNKEY_VMCP_BACKEND-}${VMCP_BACKEND-}" ]; then
    export UNKEY_VMCP_BACKEND=cloudhypervisor
    echo "Set UNKEY_VMCP_BACKEND=cloudhypervisor for compatibility"
fi

echo "Migration complete. New variables:"
env | grep 'UNKEY_VMCP_' || :

# In zsh $0 of a sourced file is the file's own name, and ZSH_EVAL_CONTEXT shows that it is sourced.
case "${ZSH_EVAL_CONTEXT-}/$0" in
*:file*) ;;
*/migrate-env.sh)
    echo "These end with this script. To set them in your shell: source scripts/migrate-env.sh"
    ;;
esac

unset -f _vmcp_backup _vmcp_migrate
unset _vmcp_old _vmcp_new _vmcp_short _vmcp_file _vmcp_n _vmcp_name
