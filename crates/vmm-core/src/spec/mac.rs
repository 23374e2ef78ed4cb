//! Hardware addresses.

use std::fmt;
use std::str::FromStr;

/// A hardware address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    /// The rule that the text breaks, for people.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let problem =
            || format!("must be six pairs of hexadecimal digits such as 02:00:00:00:00:01, not \"{text}\"");
        let mut mac = [0_u8; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut mac {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(problem)?;
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(problem());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| problem())?;
        }
        if parts.next().is_some() {
            return Err(problem());
        }
        if mac == [0; 6] || mac[0] & 1 == 1 {
            return Err(format!(
                "must be a unicast address, not \"{text}\": the first pair must be even, and not all zero"
            ));
        }
        Ok(Self(mac))
    }
}
