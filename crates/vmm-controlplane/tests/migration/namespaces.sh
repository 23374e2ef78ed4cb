# Gives the migration guide a host of its own, where its paths and its port are free: folders and a network that nobody else sees.
#
#   namespaces.sh STAGE NEEDED COMMAND...
#
# STAGE is an empty folder, NEEDED the paths, each ending in a slash, that must stay visible although they lie in /tmp. The first
# process of a process namespace runs this: it reaps what the rest leave behind, and all of them end with it.
set -e
stage=$1 needed=$2
shift 2
mount -t tmpfs tmpfs "$stage"
ip link set lo up

# renew FOLDER MODE [all]: puts an empty folder in the place of FOLDER, with what was in it bound back: all, or what is needed.
renew() {
    new=$stage$1
    mkdir -p "$new"
    mount -t tmpfs -o "mode=$2" tmpfs "$new"
    for child in "$1"/*; do
        if [ "$3" != all ]; then
            case " $needed" in *" $child/"*) ;; *) continue ;; esac
        fi
        if [ -L "$child" ]; then
            cp -P "$child" "$new"
        elif [ -d "$child" ]; then
            mkdir "$new/${child##*/}"
            mount --rbind "$child" "$new/${child##*/}"
        fi
    done
    mount --rbind "$new" "$1"
}

renew /opt 755 all
renew /var/lib 755 all
renew /run 755 all
renew /tmp 1777
for folder in /run/libvirt /run/vmm-controlplane /var/lib/vmm-controlplane /opt/kernels /var/lib/vms; do
    mkdir -p "$folder"
    mount -t tmpfs -o mode=755 tmpfs "$folder"
done
status=0
"$@" || status=$?
exit "$status"
