//! Converts a disk into its block nodes and its device.

use serde_json::{Value, json};
use vmm_core::spec::{Disk, DiskCache, DiskFormat, RateLimit};

use super::option::DiskOption;
use super::{ImageKind, PathNotUtf8, QemuMachine, address, merged};
use crate::qemu::layout::{DISK_SLOT, SERIAL_LEN};

/// Returns the block nodes and the device of a disk.
///
/// # Errors
///
/// [`PathNotUtf8`].
pub(super) fn option(
    machine: QemuMachine,
    index: usize,
    disk: &Disk,
    image: ImageKind,
) -> Result<DiskOption, PathNotUtf8> {
    let Disk { index: _, id, path, read_only, is_root: _, format, backing_files, cache, direct_io, limits } =
        disk;
    let filename = path.to_str().ok_or_else(|| PathNotUtf8(path.clone()))?;
    let throttle = format!("disk{index}");
    let common = json!({
        "read-only": read_only,
        "discard": if *read_only { "ignore" } else { "unmap" },
        "cache": { "direct": direct_io, "no-flush": *cache == DiskCache::Unsafe },
    });
    let driver = match image {
        ImageKind::File => "file",
        ImageKind::BlockDevice => "host_device",
    };
    let file_node = json!({
        "driver": driver, "node-name": format!("disk{index}-file"), "filename": filename, "locking": "auto",
    });
    let mut format_node = json!({ "driver": format.as_str(), "node-name": format!("disk{index}-format") });
    if *format == DiskFormat::Qcow2 && !backing_files {
        // Without this line QEMU would open the backing file that the image's header names.
        format_node["backing"] = Value::Null;
    }
    let mut nodes = vec![merged(file_node, &common), merged(format_node, &common)];
    let limit = throttle_group(&throttle, *limits);
    if let Some(group) = &limit {
        nodes.push(json!({
            "driver": "throttle", "node-name": throttle, "throttle-group": group["id"],
            "read-only": read_only,
        }));
    }
    // Ids are ASCII, so bytes and characters agree. A fault of the disk is reported to the guest,
    // as on the other backends.
    let serial: String = id.chars().take(SERIAL_LEN).collect();
    let device = json!({
        "driver": format!("virtio-blk-{}", machine.virtio()), "id": format!("disk{index}"),
        "serial": serial, "werror": "report", "rerror": "report",
    });
    Ok(DiskOption { nodes, limit, device: merged(device, &address(machine, DISK_SLOT, index, index)) })
}

fn throttle_group(disk: &str, limits: RateLimit) -> Option<Value> {
    let mut ceilings = serde_json::Map::new();
    if let Some(bytes) = limits.bytes_per_second {
        ceilings.insert("bps-total".to_owned(), bytes.into());
    }
    if let Some(operations) = limits.operations_per_second {
        ceilings.insert("iops-total".to_owned(), operations.into());
    }
    (!ceilings.is_empty())
        .then(|| json!({ "qom-type": "throttle-group", "id": format!("{disk}-limit"), "limits": ceilings }))
}
