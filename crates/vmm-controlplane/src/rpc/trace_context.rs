//! The header `traceparent`, in which a caller names the trace of its request (W3C Trace Context).

use http::HeaderMap;

const HEADER: &str = "traceparent";

/// The caller's span in its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TraceParent<'a> {
    /// The trace, 32 hexadecimal digits.
    pub(super) trace_id: &'a str,
    /// The caller's span, 16 hexadecimal digits.
    pub(super) parent_id: &'a str,
}

impl<'a> TraceParent<'a> {
    /// Reads the header. A header that is not valid is ignored, as the recommendation demands.
    pub(super) fn of(headers: &'a HeaderMap) -> Option<Self> {
        let mut all = headers.get_all(HEADER).iter();
        match (all.next(), all.next()) {
            (Some(only), None) => Self::parse(only.to_str().ok()?),
            _ => None,
        }
    }

    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.split('-');
        let (version, trace_id, parent_id, flags) =
            (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_known = version == "00";
        // A later version may append parts; version ff does not exist.
        let is_whole = if is_known { parts.next().is_none() } else { version != "ff" };
        let is_sound = is_hex(version, 2)
            && is_hex(trace_id, 32)
            && is_hex(parent_id, 16)
            && is_hex(flags, 2)
            && [trace_id, parent_id].iter().all(|id| id.bytes().any(|digit| digit != b'0'));
        (is_whole && is_sound).then_some(Self { trace_id, parent_id })
    }
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn of(values: &[&str]) -> Option<(String, String)> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(HEADER, value.parse().unwrap());
        }
        TraceParent::of(&headers).map(|it| (it.trace_id.to_owned(), it.parent_id.to_owned()))
    }

    #[test]
    fn a_valid_trace_header_gives_trace_and_span() {
        let read = Some(("4bf92f3577b34da6a3ce929d0e0e4736".to_owned(), "00f067aa0ba902b7".to_owned()));
        assert_eq!(of(&[GOOD]), read);
        assert_eq!(of(&[&GOOD.replacen("00", "cc", 1)]), read, "a later version");
        assert_eq!(of(&[&format!("{}-more", GOOD.replacen("00", "cc", 1))]), read);
    }

    #[test]
    fn an_invalid_trace_header_is_ignored() {
        let long = format!("{GOOD}-more");
        for bad in [
            "",
            "00",
            &long,
            &GOOD.to_uppercase(),
            &GOOD.replacen("00", "ff", 1),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4bf92f3577b34da6a3ce929d0e0e473-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
        ] {
            assert_eq!(of(&[bad]), None, "{bad}");
        }
        assert_eq!(of(&[GOOD, GOOD]), None);
        assert_eq!(of(&[]), None);
    }
}
