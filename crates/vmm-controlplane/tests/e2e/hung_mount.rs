//! A file system that never answers.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::harness::{World, skipped};

/// A mount namespace in which a FUSE file system stands under one folder. Nobody serves it, so the kernel keeps every process
/// waiting that looks at a file there. The end of its holder ends all such waits.
pub(crate) struct HungMount {
    holder: Child,
}

impl HungMount {
    /// Mounts one on the folder `dir` of `world` and has the world's daemons run where the folder is seen so.
    pub(crate) fn on(world: &mut World, dir: &Path, test: &str) -> Option<Self> {
        let script = "exec 3<>/dev/fuse && mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 hung \"$1\" \
                      && echo mounted && exec sleep 900";
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"]).arg(dir);
        let started = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
        let Ok(holder) = started else {
            skipped(test, "there is no program `unshare`");
            return None;
        };
        let mut mount = Self { holder };
        let mut line = String::new();
        let _ = BufReader::new(mount.holder.stdout.take().unwrap()).read_line(&mut line);
        if line.trim() != "mounted" {
            skipped(test, "a FUSE file system can only be mounted by root, with /dev/fuse");
            return None;
        }
        let pid = mount.holder.id().to_string();
        world.wrapper = ["nsenter", "--mount", "--target", &pid].map(str::to_owned).into();
        Some(mount)
    }

    /// Takes the mount off `dir`, so that the files below answer.
    pub(crate) fn take_off(&self, dir: &Path) {
        let pid = self.holder.id().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--target", &pid, "umount", "--lazy"]).arg(dir);
        assert!(command.status().unwrap().success());
    }
}

impl Drop for HungMount {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
