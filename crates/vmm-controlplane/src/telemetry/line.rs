//! The form of a log line: one flat JSON object, or text for a terminal.
//!
//! ```text
//!   fields of the spans, outermost first ─┐
//!                                         ├─► one set of keys ─┬─► {"timestamp":…,"level":…,…}
//!   fields of the event ──────────────────┘                    └─► 12:01:07.312  INFO message  …
//! ```
//!
//! Both forms have the same keys, which `docs/operating.md` lists. A key stands once in a line. If
//! several spans or the event have the same key, the innermost value counts, because it is the most
//! specific. The standard formats of `tracing-subscriber` write the fields of spans apart from
//! those of the event, and those of the current span twice.

use std::fmt;

use serde_json::{Map, Value};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, JsonFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// The keys that answer who did what to which VM and how it ended, in the order of a text line. All
/// other keys follow in the order of the alphabet.
const FIRST_KEYS: [&str; 10] =
    ["operation", "vm_id", "actor", "origin", "outcome", "reason", "detail", "error", "state", "duration_ms"];
/// The keys at the end of a text line, because a person seldom reads them.
const LAST_KEYS: [&str; 4] = ["backend", "uid", "path", "request_id"];

const BOLD: &str = "\x1b[1m";
const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

/// The form of the lines.
#[derive(Clone, Copy, Debug)]
pub(super) enum Form {
    /// One JSON object a line, for programs.
    Json,
    /// The time, the level, the message and the keys, for a person at a terminal.
    Text,
}

impl<S> FormatEvent<S, JsonFields> for Form
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let mut keys = keys(ctx, event)?;
        let message = keys.remove("message");
        let message = message.as_ref().and_then(Value::as_str).unwrap_or_default();
        let meta = event.metadata();
        match self {
            Self::Json => json(&mut writer, &time, *meta.level(), message, &keys, meta.target()),
            Self::Text => text(&mut writer, &time, *meta.level(), message, &mut keys),
        }
    }
}

/// Returns the keys of the spans that `event` belongs to, and its own.
fn keys<S>(ctx: &FmtContext<'_, S, JsonFields>, event: &Event<'_>) -> Result<Map<String, Value>, fmt::Error>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let mut keys = Map::new();
    for span in ctx.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
        if let Some(fields) = span.extensions().get::<FormattedFields<JsonFields>>() {
            keys.extend(object(fields));
        }
    }
    let mut fields = String::new();
    JsonFields::new().format_fields(Writer::new(&mut fields), event)?;
    keys.extend(object(&fields));
    Ok(keys)
}

/// Reads what [`JsonFields`] has written, which is an object, or nothing where no field has a
/// value.
fn object(fields: &str) -> Map<String, Value> {
    serde_json::from_str(fields).unwrap_or_default()
}

fn json(
    writer: &mut Writer<'_>,
    time: &str,
    level: Level,
    message: &str,
    keys: &Map<String, Value>,
    target: &str,
) -> fmt::Result {
    let text = |text: &str| Value::from(text).to_string();
    // The head is written by hand, because an object of `serde_json` sorts its keys, and a person
    // who looks at the file searches the time and the message at the beginning.
    write!(
        writer,
        r#"{{"timestamp":{},"level":{},"message":{}"#,
        text(time),
        text(level.as_str()),
        text(message)
    )?;
    for (key, value) in keys {
        write!(writer, ",{}:{value}", text(key))?;
    }
    writeln!(writer, r#","target":{}}}"#, text(target))
}

fn text(
    writer: &mut Writer<'_>,
    time: &str,
    level: Level,
    message: &str,
    keys: &mut Map<String, Value>,
) -> fmt::Result {
    let ansi = writer.has_ansi_escapes();
    let paint = |code: &'static str| if ansi { code } else { "" };
    // The date is left out: a person at a terminal knows it, and the time fits into 12 columns.
    let clock = time.get(11..23).unwrap_or(time);
    let color = match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        Level::DEBUG | Level::TRACE => "\x1b[34m",
    };
    let (dim, bold, reset) = (paint(DIM), paint(BOLD), paint(RESET));
    write!(writer, "{dim}{clock}{reset} {}{level:>5}{reset} {bold}", paint(color))?;
    write_safely(writer, message)?;
    write!(writer, "{reset}")?;
    let last: Vec<_> = LAST_KEYS.iter().filter_map(|key| Some((*key, keys.remove(*key)?))).collect();
    let first: Vec<_> = FIRST_KEYS.iter().filter_map(|key| Some((*key, keys.remove(*key)?))).collect();
    let rest = keys.iter().map(|(key, value)| (key.as_str(), value.clone()));
    for (key, value) in first.into_iter().chain(rest).chain(last) {
        write!(writer, " {dim}{key}={reset}")?;
        match value {
            Value::String(value) if is_plain(&value) => write_safely(writer, &value)?,
            Value::String(value) => {
                writer.write_char('"')?;
                write_safely(writer, &value)?;
                writer.write_char('"')?;
            }
            other => write!(writer, "{other}")?,
        }
    }
    writeln!(writer)
}

/// Returns true if a value needs no quotes.
fn is_plain(value: &str) -> bool {
    !value.is_empty() && !value.contains([' ', '"', '='])
}

/// Writes `text` with its control characters escaped, because a name that a client chose must not
/// move the cursor of the terminal or begin a line of its own.
fn write_safely(writer: &mut Writer<'_>, text: &str) -> fmt::Result {
    for letter in text.chars() {
        if letter.is_control() {
            write!(writer, "{}", letter.escape_default())?;
        } else {
            writer.write_char(letter)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Lines {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    /// Returns what `work` logs in `form`.
    fn logged(form: Form, work: impl FnOnce()) -> String {
        let lines = Lines::default();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .fmt_fields(JsonFields::new())
            .event_format(form)
            .with_writer(lines.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        let bytes = lines.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn a_call() {
        let request =
            tracing::info_span!("request", request_id = "id-1", vm_id = "asked", uid = tracing::field::Empty);
        let _request = request.enter();
        request.record("uid", "0192");
        let _vm = tracing::info_span!("vm", vm_id = "web-1").entered();
        tracing::warn!(
            operation = "BootVm",
            duration_ms = 7_u64,
            detail = "no \"room\"\n\x1b[2J",
            "it failed"
        );
    }

    #[test]
    fn a_json_line_is_one_flat_object_with_unique_keys() {
        let line = logged(Form::Json, a_call);
        let read: Map<String, Value> = serde_json::from_str(&line).unwrap();
        assert!(line.starts_with("{\"timestamp\":\"2"), "{line}");
        assert_eq!(line.matches("\"vm_id\":").count(), 1, "{line}");
        for (key, value) in [
            ("level", Value::from("WARN")),
            ("message", "it failed".into()),
            ("request_id", "id-1".into()),
            ("uid", "0192".into()),
            ("vm_id", "web-1".into()),
            ("operation", "BootVm".into()),
            ("duration_ms", 7.into()),
            ("detail", "no \"room\"\n\u{1b}[2J".into()),
        ] {
            assert_eq!(read[key], value, "{line}");
        }
    }

    #[test]
    fn a_text_line_begins_with_the_message_and_has_no_control_bytes() {
        let line = logged(Form::Text, a_call);
        let (clock, rest) = line.split_at(12);
        assert!(clock.bytes().all(|byte| byte.is_ascii_digit() || b":.".contains(&byte)), "{line}");
        assert_eq!(
            rest,
            "  WARN it failed operation=BootVm vm_id=web-1 detail=\"no \"room\"\\n\\u{1b}[2J\" duration_ms=7 uid=0192 \
             request_id=id-1\n"
        );
    }
}
