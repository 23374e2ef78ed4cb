//! The types of the settings, and the pure parsers that read them from text.
//!
//! A parser returns a [`ValueError`], with the error in the text and the valid values. The loader
//! adds the setting and the origin of the text.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::error::printable;

mod listening;

pub(super) use listening::{socket_group, socket_mode, socket_path};

/// The longest path of a Unix socket that Linux accepts, in bytes.
pub(super) const SOCKET_PATH_MAX: usize = 107;
/// The bytes reserved for the names that the program makes below its runtime directory.
pub(super) const SOCKET_NAMES_MAX: usize = 48;

/// The reason for which a text is not a value of its setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ValueError {
    /// The error in the text.
    pub(super) message: String,
    /// The values that the setting accepts; it ends the sentence "set UNKEY_VMCP_X to …".
    pub(super) want: String,
    /// True if the message is complete, because users know it from the predecessor. Otherwise the
    /// setting's key is put before it.
    pub(super) verbatim: bool,
}

impl ValueError {
    /// Makes a fault whose message begins with `text` in quotes.
    fn not(text: &str, what: &str, want: impl Into<String>) -> Self {
        Self::of(format!("\"{}\" {what}", printable(text)), want)
    }

    pub(super) fn of(message: impl Into<String>, want: impl Into<String>) -> Self {
        Self { message: message.into(), want: want.into(), verbatim: false }
    }

    fn known(message: impl Into<String>, want: impl Into<String>) -> Self {
        Self { verbatim: true, ..Self::of(message, want) }
    }
}

/// The hypervisors that the program drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BackendChoice {
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
    /// QEMU.
    Qemu,
}

impl BackendChoice {
    /// Every backend, the default one first.
    pub const ALL: [BackendChoice; 3] = [Self::CloudHypervisor, Self::Firecracker, Self::Qemu];

    /// Returns the name on the wire and in the configuration.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "cloudhypervisor",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
        }
    }

    /// Returns the name in the errors about this backend's endpoint.
    const fn in_errors(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "cloud hypervisor",
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
        }
    }
}

impl fmt::Display for BackendChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The error about a name that no backend has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnsupportedBackend(pub String);

impl fmt::Display for UnsupportedBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unsupported backend type: {}", printable(&self.0))
    }
}

impl std::error::Error for UnsupportedBackend {}

impl FromStr for BackendChoice {
    type Err = UnsupportedBackend;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|backend| backend.as_str() == text);
        named.ok_or_else(|| UnsupportedBackend(text.to_owned()))
    }
}

/// The way in which a hypervisor is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// The daemon starts a process for each VM.
    Managed,
    /// Another program's VMMs listen on these sockets, and each serves one VM. The list is never
    /// empty.
    Unix(Vec<PathBuf>),
    /// libvirt, by its connection URI; QEMU only.
    Libvirt(String),
}

/// The use of KVM by QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmSetting {
    /// KVM is used if /dev/kvm opens and the CPU shows vmx or svm.
    Auto,
    /// Always.
    On,
    /// Never: software emulation.
    Off,
}

/// The address on which the daemon listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddress {
    /// An IP address without brackets, or a host name, which is resolved at bind.
    pub host: String,
    /// The TCP port; 0 lets the system choose.
    pub port: u16,
}

impl ListenAddress {
    /// Returns the socket address if the host is an IP address, which needs no resolving.
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        self.host.parse().ok().map(|ip| SocketAddr::new(ip, self.port))
    }

    /// Returns true if only this machine can reach the address. A name counts as loopback only if
    /// it is `localhost`.
    pub fn is_loopback(&self) -> bool {
        match self.host.parse::<IpAddr>() {
            Ok(ip) => is_loopback(ip),
            Err(_) => self.host == "localhost",
        }
    }
}

/// Returns true if only this machine can reach an address. An IPv4 address in the form of IPv6
/// counts as the IPv4 address.
pub fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.socket_addr() {
            Some(address) => address.fmt(f),
            None => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

pub(super) fn backend(text: &str) -> Result<BackendChoice, ValueError> {
    text.parse().map_err(|error: UnsupportedBackend| {
        ValueError::known(error.to_string(), "cloudhypervisor, firecracker or qemu")
    })
}

pub(super) fn endpoint(backend: BackendChoice, text: &str) -> Result<Endpoint, ValueError> {
    let fault = |why: &str| {
        let also = match backend {
            BackendChoice::Qemu => ", qemu:///system, qemu:///session or qemu+unix:///system",
            BackendChoice::CloudHypervisor | BackendChoice::Firecracker => " (or several, comma-separated)",
        };
        ValueError::known(
            format!("{} endpoint is required: {why}", backend.in_errors()),
            format!("unix:///absolute/path{also}, or leave it unset to have processes started"),
        )
    };
    if backend == BackendChoice::Qemu && is_libvirt(text) {
        return Ok(Endpoint::Libvirt(text.to_owned()));
    }
    let mut sockets = Vec::new();
    for piece in text.split(',').map(str::trim) {
        let shown = printable(piece);
        let path = match piece.strip_prefix("unix://") {
            _ if piece.is_empty() => return Err(fault("it is empty, or has an empty piece")),
            None => return Err(fault(&format!("\"{shown}\" is no such endpoint"))),
            Some("") => return Err(fault(&format!("\"{shown}\" has no path"))),
            Some(path) => PathBuf::from(path),
        };
        if !path.is_absolute() || path.file_name().is_none() || piece.contains(char::is_control) {
            return Err(fault(&format!("\"{shown}\" has no absolute path of a socket")));
        }
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(fault(&format!("the path in \"{shown}\" is longer than {SOCKET_PATH_MAX} bytes")));
        }
        if sockets.contains(&path) {
            return Err(fault(&format!("\"{shown}\" is listed twice")));
        }
        sockets.push(path);
    }
    Ok(Endpoint::Unix(sockets))
}

/// Returns true if `text` is one of the libvirt URIs that are reached without leaving the machine.
fn is_libvirt(text: &str) -> bool {
    let (address, _query) = text.split_once('?').unwrap_or((text, ""));
    let local = address.strip_prefix("qemu://").or_else(|| address.strip_prefix("qemu+unix://"));
    matches!(local, Some("/system" | "/session")) && !text.contains(char::is_control)
}

pub(super) fn port(text: &str) -> Result<u16, ValueError> {
    text.parse().map_err(|_| ValueError::not(text, "is not a port", "a number from 0 to 65535"))
}

/// Reads an address, or `none`, which is no listener on TCP.
pub(super) fn address(text: &str) -> Result<Option<String>, ValueError> {
    if text == "none" { Ok(None) } else { tcp_address(text).map(Some) }
}

fn tcp_address(text: &str) -> Result<String, ValueError> {
    let bare = text.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(text);
    if bare.parse::<IpAddr>().is_ok() {
        return Ok(bare.to_owned());
    }
    if text.parse::<SocketAddr>().is_ok() || text.rsplit_once(':').is_some_and(|(name, _)| is_host_name(name))
    {
        return Err(ValueError::not(
            text,
            "names a port too",
            "the address alone, and UNKEY_VMCP_PORT to the port",
        ));
    }
    host_name(text).ok_or_else(|| {
        ValueError::not(
            text,
            "is neither an IP address nor a host name",
            "one, such as 127.0.0.1, or to none",
        )
    })
}

/// Returns the name in lower case and without its final dot; `None` if it is not one.
fn host_name(text: &str) -> Option<String> {
    let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
    is_host_name(&name).then_some(name)
}

fn is_host_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // A name that ends in a number is a wrong IP address, such as 127.0.0.256.
    let numeric = name.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    name.len() <= 253 && name.split('.').all(label) && !numeric
}

pub(super) fn allowed_hosts(text: &str) -> Result<Vec<String>, ValueError> {
    pieces(text, |piece| {
        let ip =
            piece.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().map(|ip| ip.to_string());
        ip.ok().or_else(|| host_name(piece)).ok_or_else(|| {
            ValueError::not(piece, "is not a host name", "names without scheme and port, comma-separated")
        })
    })
}

pub(super) fn cors_origins(text: &str) -> Result<Vec<String>, ValueError> {
    pieces(text, |piece| {
        let fault = || {
            let want = "origins such as https://vms.example.com, comma-separated; each must be named, as * would let \
                        any web page control the VMs";
            ValueError::not(piece, "is not the origin of a web page", want)
        };
        let (scheme, authority) = piece.split_once("://").ok_or_else(fault)?;
        let authority = authority.parse::<http::uri::Authority>().map_err(|_| fault())?;
        if !matches!(scheme, "http" | "https") || !is_plain(&authority) {
            return Err(fault());
        }
        // Browsers send the Origin header in lower case.
        Ok(piece.to_ascii_lowercase())
    })
}

/// Reads a comma-separated list; an empty text is an empty list, and repeated pieces count once.
fn pieces(text: &str, read: impl Fn(&str) -> Result<String, ValueError>) -> Result<Vec<String>, ValueError> {
    let mut list = Vec::new();
    for piece in text.split(',').map(str::trim).filter(|piece| !piece.is_empty()) {
        let item = read(piece)?;
        if !list.contains(&item) {
            list.push(item);
        }
    }
    Ok(list)
}

/// Returns true if an authority is a host and at most a port. Credentials are refused, because they
/// would get into logs.
fn is_plain(authority: &http::uri::Authority) -> bool {
    let rest = authority.as_str().strip_prefix(authority.host()).unwrap_or(":");
    let port_is_sound = rest.is_empty() || authority.port_u16().is_some_and(|port| port > 0);
    !authority.host().is_empty() && port_is_sound && !authority.as_str().contains('@')
}

pub(super) fn otel_endpoint(text: &str) -> Result<String, ValueError> {
    let fault = |why: &str| {
        ValueError::not(text, why, "HOST:PORT, or an http:// or https:// URL without credentials")
    };
    match text.split_once("://") {
        None => {
            let authority = text.parse::<http::uri::Authority>().ok().filter(is_plain);
            let authority = authority.filter(|authority| authority.port_u16().is_some());
            authority.ok_or_else(|| fault("is not HOST:PORT"))?;
        }
        Some(("http" | "https", _)) => {
            let uri = text.parse::<http::Uri>().ok();
            let authority =
                uri.as_ref().and_then(http::Uri::authority).filter(|authority| is_plain(authority));
            authority.ok_or_else(|| fault("is not a URL that telemetry can be sent to"))?;
        }
        Some(_) => return Err(fault("has a scheme that OTLP over HTTP does not know")),
    }
    Ok(text.to_owned())
}

pub(super) fn sampling_rate(text: &str) -> Result<f64, ValueError> {
    let rate = text.parse::<f64>().ok().filter(|rate| (0.0..=1.0).contains(rate));
    rate.ok_or_else(|| ValueError::not(text, "is not a share", "a number from 0.0 to 1.0"))
}

pub(super) fn boolean(text: &str) -> Result<bool, ValueError> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err(ValueError::not(text, "is neither true nor false", "true or false")),
    }
}

pub(super) fn kvm(text: &str) -> Result<KvmSetting, ValueError> {
    if text.eq_ignore_ascii_case("auto") {
        return Ok(KvmSetting::Auto);
    }
    let choice = boolean(text).map(|on| if on { KvmSetting::On } else { KvmSetting::Off });
    choice.map_err(|_| ValueError::not(text, "is none of auto, true and false", "auto, true or false"))
}

/// Reads a whole number with an optional unit (s, m, h, d); no less than a second, no more than
/// `most`.
pub(super) fn duration(text: &str, most: Duration) -> Result<Duration, ValueError> {
    let want = || {
        let days = most.as_secs() / 86_400;
        format!("a whole number of seconds, or one with a unit (30s, 10m, 12h, 7d), from 1s to {days}d")
    };
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(ValueError::not(text, "has an unknown unit", want())),
    };
    let number = digits.parse::<u64>().map_err(|_| ValueError::not(text, "is not a duration", want()))?;
    let duration = number.checked_mul(unit).map(Duration::from_secs);
    let in_range = duration.filter(|duration| (Duration::from_secs(1)..=most).contains(duration));
    in_range.ok_or_else(|| ValueError::not(text, "is out of range", want()))
}

/// Reads a whole number of bytes in `range`, with an optional unit (K, M, G) of 1,024 each.
pub(super) fn size(text: &str, range: &RangeInclusive<u64>) -> Result<u64, ValueError> {
    let want = || {
        format!(
            "a whole number of bytes, or one with a unit (256K, 1M, 1G), from {} to {}",
            range.start(),
            range.end()
        )
    };
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return Err(ValueError::not(text, "has an unknown unit", want())),
    };
    let number = digits.parse::<u64>().map_err(|_| ValueError::not(text, "is not a size", want()))?;
    let size = number.checked_mul(unit).filter(|size| range.contains(size));
    size.ok_or_else(|| ValueError::not(text, "is out of range", want()))
}

/// Reads a count: a whole number of at most `most`.
pub(super) fn count(text: &str, most: usize) -> Result<usize, ValueError> {
    let want = || format!("a whole number from 0 to {most}");
    let number = text.parse::<usize>().map_err(|_| ValueError::not(text, "is not a number", want()))?;
    if number > most {
        return Err(ValueError::not(text, "is out of range", want()));
    }
    Ok(number)
}

pub(super) fn absolute_path(text: &str) -> Result<PathBuf, ValueError> {
    let path = Path::new(text);
    if path.is_absolute() && !text.contains(char::is_control) {
        return Ok(path.to_owned());
    }
    Err(ValueError::not(text, "is not an absolute path", "one, beginning with /"))
}

pub(super) fn runtime_dir(text: &str) -> Result<PathBuf, ValueError> {
    let path = absolute_path(text)?;
    let most = SOCKET_PATH_MAX - SOCKET_NAMES_MAX;
    match path.as_os_str().len() {
        length if length <= most => Ok(path),
        length => Err(ValueError::not(
            text,
            &format!("is {length} bytes long, which leaves no room for the names of sockets"),
            format!("a path of {most} bytes at most"),
        )),
    }
}

pub(super) fn binary(text: &str) -> Result<PathBuf, ValueError> {
    let path = Path::new(text);
    let sound = path.file_name().is_some() && !text.contains(char::is_control) && !text.ends_with('/');
    if sound && (path.is_absolute() || !text.contains('/')) {
        return Ok(path.to_owned());
    }
    Err(ValueError::not(text, "is not a program", "a name to look up on PATH, or an absolute path"))
}

/// Reads a text that must fit on one line and must not be empty.
pub(super) fn single_line(text: &str) -> Result<String, ValueError> {
    if text.trim().is_empty() || text.contains(char::is_control) {
        return Err(ValueError::not(text, "is empty or has control characters", "a text on one line"));
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests;
