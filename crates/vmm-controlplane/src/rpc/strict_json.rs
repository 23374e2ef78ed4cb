//! Checks the shape of requests against the `.proto` before they are decoded.
//!
//! The generated JSON decoder refuses an unknown field too. But it stops at the first one, gives a
//! line and a column where a caller needs a path, accepts a JSON array as a message, and takes the
//! last value of a key that stands twice in a map.
//!
//! This check reports every unknown field, every repeated key and every value of a wrong type at
//! once, with its path and with the names that are valid there. The decoder's own functions decide
//! which values are valid; see [`values`](super::values). The number of entries is limited in both
//! codecs; see [`entries`].

use std::collections::{HashMap, HashSet};
use std::fmt;

use buffa_descriptor::{DescriptorPool, FieldKind, MessageDescriptor, PoolError, SingularKind};
use connectrpc::interceptor::{StreamRequest, StreamResponse, UnaryRequest, UnaryResponse};
use connectrpc::{
    CodecFormat, ConnectError, Interceptor, Next, NextStream, Payload, PayloadStream, async_trait,
};
use futures::{StreamExt as _, future};
use serde::de::{
    self, DeserializeSeed, Deserializer, IgnoredAny, IntoDeserializer as _, MapAccess, SeqAccess, Visitor,
};

use super::entries::{self, MAX_ENTRIES};
use super::error::invalid_argument;
use super::syntax;
use super::values::{PlainType, shortened};

/// The most violations that are kept, which is far more than an answer has room for.
const MAX_VIOLATIONS: usize = 1000;

/// Refuses requests that are not JSON, whose shape is not that of the method's request message, or
/// that have too many entries.
pub(crate) struct JsonShapeInterceptor {
    pool: DescriptorPool,
    /// The names of the request messages by procedure, such as `/vmm.v1.VmService/CreateVm`.
    requests: HashMap<String, String>,
}

impl JsonShapeInterceptor {
    /// Reads the shapes of the messages from a wire-format `FileDescriptorSet`.
    pub(crate) fn new(descriptor_set: &[u8]) -> Result<Self, PoolError> {
        let pool = DescriptorPool::decode(descriptor_set)?;
        let requests = pool
            .services()
            .iter()
            .flat_map(|service| service.methods().iter().map(move |method| (service, method)))
            .map(|(service, method)| {
                let procedure = format!("/{}/{}", service.full_name(), method.name());
                (procedure, pool.message(method.input()).full_name().to_owned())
            })
            .collect();
        Ok(Self { pool, requests })
    }

    pub(crate) fn check(&self, procedure: Option<&str>, payload: &Payload) -> Result<(), ConnectError> {
        let message = procedure
            .and_then(|procedure| self.requests.get(procedure))
            .and_then(|name| self.pool.message_by_name(name));
        match (payload.format(), message) {
            (CodecFormat::Json, Some(message)) => check_json(&self.pool, message, payload.bytes()),
            (CodecFormat::Proto, Some(message)) => entries::check(&self.pool, message, payload.bytes()),
            _ => Ok(()),
        }
    }
}

fn check_json(pool: &DescriptorPool, message: &MessageDescriptor, json: &[u8]) -> Result<(), ConnectError> {
    if json.iter().all(u8::is_ascii_whitespace) {
        return Err(invalid_argument([("request", "the body is empty: send a JSON object, at least {}")]));
    }
    let mut report = ShapeReport { path: String::new(), violations: Vec::new(), entries: 0 };
    let shape = ShapeStep { pool, expected: ExpectedKind::Message(message), report: &mut report };
    let mut text = serde_json::Deserializer::from_slice(json);
    // The walk returns an error in two cases. The text is not JSON: then the error is a violation
    // of its own. Or there are too many entries: then the walk has added that violation itself, and
    // its error is none of syntax.
    let walked = shape.deserialize(&mut text).and_then(|()| text.end());
    if let Err(error) = walked
        && let Some(violation) = syntax::explain(json, &error)
    {
        report.path.clear();
        report.add(violation);
    }
    if report.violations.is_empty() { Ok(()) } else { Err(invalid_argument(report.violations)) }
}

#[async_trait]
impl Interceptor for JsonShapeInterceptor {
    async fn intercept_unary(
        &self,
        req: UnaryRequest,
        next: Next<'_>,
    ) -> Result<UnaryResponse, ConnectError> {
        self.check(req.ctx.path(), &req.payload)?;
        next.run(req).await
    }

    async fn intercept_streaming(
        &self,
        req: StreamRequest,
        mut inbound: PayloadStream,
        next: NextStream<'_>,
    ) -> Result<StreamResponse, ConnectError> {
        if !req.ctx.path().is_some_and(|procedure| self.requests.contains_key(procedure)) {
            return next.run(req, inbound).await;
        }
        // No method of this API takes a stream of messages, so the first message is the only one.
        let Some(first) = inbound.next().await else { return next.run(req, inbound).await };
        let first = first?;
        self.check(req.ctx.path(), &first)?;
        next.run(req, Box::pin(futures::stream::once(future::ready(Ok(first))).chain(inbound))).await
    }
}

/// The point that the walk has reached, and the violations found so far.
struct ShapeReport {
    path: String,
    violations: Vec<(String, String)>,
    /// The number of entries of all lists and maps so far.
    entries: usize,
}

impl ShapeReport {
    fn add(&mut self, violation: String) {
        if self.violations.len() < MAX_VIOLATIONS {
            let field = if self.path.is_empty() { "request" } else { &self.path };
            self.violations.push((field.to_owned(), violation));
        }
    }

    /// Counts one entry of the list or map at the present path.
    ///
    /// # Errors
    ///
    /// The limit on entries is passed. The error ends the walk.
    fn count<E: de::Error>(&mut self) -> Result<(), E> {
        self.entries += 1;
        if self.entries <= MAX_ENTRIES {
            return Ok(());
        }
        self.add(entries::too_many());
        Err(E::custom("too many entries"))
    }

    /// Runs `step` with `segment` appended to the path.
    fn within<T>(&mut self, segment: &str, step: impl FnOnce(&mut Self) -> T) -> T {
        let length = self.path.len();
        if !self.path.is_empty() && !segment.starts_with('[') {
            self.path.push('.');
        }
        self.path.push_str(segment);
        let result = step(self);
        self.path.truncate(length);
        result
    }
}

/// The kind of value that the `.proto` defines for a JSON value.
#[derive(Clone, Copy)]
enum ExpectedKind<'a> {
    Message(&'a MessageDescriptor),
    List(SingularKind),
    Map(SingularKind),
    Value(PlainType<'a>),
    /// Any value: the value is below an unknown field.
    Anything,
}

impl<'a> ExpectedKind<'a> {
    fn one(pool: &'a DescriptorPool, kind: SingularKind) -> Self {
        match kind {
            SingularKind::Message(index) => Self::Message(pool.message(index)),
            SingularKind::Scalar(scalar) => Self::Value(PlainType::Scalar(scalar)),
            SingularKind::Enum(index) => Self::Value(PlainType::Enum(pool.enumeration(index))),
        }
    }

    /// Describes the expected value, for a violation at a point where another kind of value stands.
    fn description(self) -> String {
        match self {
            Self::Message(_) | Self::Map(_) => "an object is expected: write { … }".to_owned(),
            Self::List(_) => "a list is expected: write [ … ]".to_owned(),
            Self::Value(value) => format!("{} is expected", value.name()),
            Self::Anything => "anything is expected".to_owned(),
        }
    }

    fn field(pool: &'a DescriptorPool, kind: FieldKind) -> Self {
        match kind {
            FieldKind::Singular(kind) => Self::one(pool, kind),
            FieldKind::List(kind) => Self::List(kind),
            FieldKind::Map { value, .. } => Self::Map(value),
        }
    }
}

/// One step of the walk: a point in the JSON and the kind of value expected there.
///
/// `serde_json` calls the visitor method that fits the value in the text. Each method adds
/// violations to the report and returns `Ok`, so that the walk goes on and finds the other
/// violations. It returns `Err` only for a syntax error and for too many entries.
struct ShapeStep<'a, 'r> {
    pool: &'a DescriptorPool,
    expected: ExpectedKind<'a>,
    report: &'r mut ShapeReport,
}

impl<'de> DeserializeSeed<'de> for ShapeStep<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ShapeStep<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        // An object at a wrong point is one violation. Its members are still read, because the text
        // behind it must be walked too, but `member` checks nothing in them.
        if matches!(self.expected, ExpectedKind::List(_) | ExpectedKind::Value(_)) {
            self.report.add(format!("is an object where {}", self.expected.description()));
        }
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if matches!(self.expected, ExpectedKind::Map(_)) {
                self.report.count()?;
            }
            self.refuse_repetition(&key, &mut seen);
            self.member(&key, &mut map)?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let ExpectedKind::List(kind) = self.expected else {
            if !matches!(self.expected, ExpectedKind::Anything) {
                self.report.add(format!("is a list where {}", self.expected.description()));
            }
            while list.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(());
        };
        // The end of a list is known only after an attempt to read the next element. So an element
        // is counted after it was walked, and the violation of the limit stands at the list's own
        // path.
        let expected = ExpectedKind::one(self.pool, kind);
        let Self { pool, report, .. } = self;
        for index in 0_usize.. {
            let seen = report.within(&format!("[{index}]"), |report| {
                list.next_element_seed(ShapeStep { pool, expected, report })
            })?;
            if seen.is_none() {
                break;
            }
            report.count()?;
        }
        Ok(())
    }

    // A plain value is compared by its type alone, which the decoder's functions decide. `null` is
    // always accepted, because the decoder reads it as an unset field.
    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        Ok(())
    }
    fn visit_bool<E: de::Error>(self, given: bool) -> Result<(), E> {
        self.value(&given, given.into_deserializer());
        Ok(())
    }
    fn visit_i64<E: de::Error>(self, given: i64) -> Result<(), E> {
        self.value(&given, given.into_deserializer());
        Ok(())
    }
    fn visit_u64<E: de::Error>(self, given: u64) -> Result<(), E> {
        self.value(&given, given.into_deserializer());
        Ok(())
    }
    fn visit_f64<E: de::Error>(self, given: f64) -> Result<(), E> {
        self.value(&given, given.into_deserializer());
        Ok(())
    }
    fn visit_str<E: de::Error>(self, given: &str) -> Result<(), E> {
        self.value(&format_args!("{given:?}"), given.into_deserializer());
        Ok(())
    }
}

impl ShapeStep<'_, '_> {
    /// Checks a number, a text or a truth value. `given` is the value as the client spelt it.
    fn value<'de>(self, given: &dyn fmt::Display, json: impl Deserializer<'de, Error = de::value::Error>) {
        match self.expected {
            ExpectedKind::Anything => {}
            ExpectedKind::Value(value) => {
                if let Some(objection) = value.objection(given, json) {
                    self.report.add(objection);
                }
            }
            other => self.report.add(format!("is {} where {}", shortened(given), other.description())),
        }
    }

    /// Reports a key that stands in an object twice. The two spellings of a message's field, such
    /// as `vm_id` and `vmId`, count as one key.
    fn refuse_repetition(&mut self, key: &str, seen: &mut HashSet<String>) {
        let name = match self.expected {
            ExpectedKind::Map(_) => key,
            ExpectedKind::Message(message) => match message.field_by_name(key) {
                Some(field) => field.name(),
                None => return,
            },
            ExpectedKind::List(_) | ExpectedKind::Value(_) | ExpectedKind::Anything => return,
        };
        if !seen.insert(name.to_owned()) {
            self.report.within(name, |report| report.add("is given twice; leave one out".to_owned()));
        }
    }

    /// Walks one member of an object.
    fn member<'de, A: MapAccess<'de>>(&mut self, key: &str, map: &mut A) -> Result<(), A::Error> {
        // The path gets the field's name in the `.proto` and not the client's spelling, so that one
        // field has one path. An unknown key is reported once, and everything below it is skipped,
        // because nothing is known about its shape. The values of a map have one expected kind and
        // are walked under their keys.
        let Self { pool, expected, report } = self;
        let expected = match *expected {
            ExpectedKind::Map(kind) => ExpectedKind::one(pool, kind),
            ExpectedKind::Message(message) => match message.field_by_name(key) {
                Some(field) => {
                    let expected = ExpectedKind::field(pool, field.kind());
                    return report.within(field.name(), |report| {
                        map.next_value_seed(ShapeStep { pool, expected, report })
                    });
                }
                None => {
                    report.within(key, |report| report.add(unknown_field(key, message)));
                    ExpectedKind::Anything
                }
            },
            ExpectedKind::List(_) | ExpectedKind::Value(_) | ExpectedKind::Anything => ExpectedKind::Anything,
        };
        if matches!(expected, ExpectedKind::Anything) {
            return map.next_value::<IgnoredAny>().map(|_| ());
        }
        report.within(key, |report| map.next_value_seed(ShapeStep { pool, expected, report }))
    }
}

fn unknown_field(key: &str, message: &MessageDescriptor) -> String {
    let names: Vec<&str> = message.fields().iter().map(|field| field.name()).collect();
    let known = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    format!("unknown field {key:?}; known here: {known}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn violations(json: &str) -> Option<String> {
        let strict = JsonShapeInterceptor::new(vmm_proto::FILE_DESCRIPTOR_SET).unwrap();
        let payload = Payload::new(json.to_owned().into(), CodecFormat::Json);
        strict.check(Some("/vmm.v1.VmService/CreateVm"), &payload).err().and_then(|error| error.message)
    }

    #[test]
    fn json_that_the_decoder_accepts_is_accepted() {
        for json in [
            "{}",
            "null",
            r#"{"vm_id":"a","config":{"cpu":null,"storage":[{"path":"/d","isRootDevice":true,"options":{"any":"v"}}]}}"#,
            r#"{"config":{"metadata":{"anything goes":"x"},"restartPolicy":{"mode":4}}}"#,
            // All of these spellings of values are accepted by the decoder.
            r#"{"config":{"cpu":{"vcpu_count":"2"},"memory":{"size_bytes":2.0}}}"#,
            r#"{"config":{"cpu":{"vcpu_count":1e1},"memory":{"size_bytes":"-1","hotplug_enabled":true}}}"#,
            r#"{"vm_id":null,"config":{"cpu":{"vcpu_count":null},"restart_policy":{"mode":null}}}"#,
            r#"{"config":{"restart_policy":{"mode":99}}}"#,
        ] {
            assert_eq!(violations(json), None, "{json}");
        }
    }

    #[test]
    fn every_unknown_field_is_reported_by_its_path() {
        let message = violations(
            r#"{"confg":1,"config":{"cpu":{"vcpus":{"deep":[1]}},"storage":[{"path":"/d"},{"readonly":true}]}}"#,
        )
        .unwrap();
        let lines: Vec<&str> = message.split("; ").filter(|part| part.contains("unknown field")).collect();
        assert_eq!(
            lines,
            [
                "confg: unknown field \"confg\"",
                "config.cpu.vcpus: unknown field \"vcpus\"",
                "config.storage[1].readonly: unknown field \"readonly\"",
            ]
        );
        assert!(message.contains("known here: vcpu_count, max_vcpu_count, topology, features"), "{message}");
    }

    #[test]
    fn a_list_for_an_object_and_an_object_for_a_list_are_reported() {
        assert!(violations("[]").unwrap().starts_with("request: is a list"));
        assert!(violations(r#"{"config":{"boot":["/k"]}}"#).unwrap().starts_with("config.boot: is a list"));
        assert!(
            violations(r#"{"config":{"metadata":[]}}"#).unwrap().starts_with("config.metadata: is a list")
        );
        assert!(violations(r#"{"config":{"storage":{"path":"/d"}}}"#).unwrap().contains("is an object"));
    }

    #[test]
    fn every_value_of_a_wrong_type_is_reported() {
        for (json, expected) in [
            (
                r#"{"config":{"memory":{"size_bytes":"512M"},"cpu":{"vcpu_count":2.5}}}"#,
                "config.memory.size_bytes: must be a whole number of at most 64 bits, not \"512M\"; \
                 config.cpu.vcpu_count: must be a whole number of at most 32 bits, not 2.5",
            ),
            (
                r#"{"config":{"memory":{"size_bytes":9223372036854775808,"hotplug_enabled":"yes"}}}"#,
                "config.memory.size_bytes: must be a whole number of at most 64 bits, not 9223372036854775808; \
                 config.memory.hotplug_enabled: must be true or false, not \"yes\"",
            ),
            (
                r#"{"vm_id":7,"config":{"storage":[{"options":{"direct_io":true}}]}}"#,
                "vm_id: must be text: write \"7\"; config.storage[0].options.direct_io: must be text: write \"true\"",
            ),
            (
                r#"{"config":{"restart_policy":{"mode":"ON_FAILURE"}}}"#,
                "config.restart_policy.mode: must be one of RESTART_MODE_NEVER, \
                 RESTART_MODE_GUEST_REBOOT, RESTART_MODE_ON_FAILURE, RESTART_MODE_ALWAYS, not \"ON_FAILURE\"",
            ),
            (
                r#"{"config":{"cpu":4,"storage":"/d","metadata":{"a":{},"b":[1]}}}"#,
                "config.cpu: is 4 where an object is expected: write { … }; config.storage: is \"/d\" where a list is \
                 expected: write [ … ]; config.metadata.a: is an object where text is expected; config.metadata.b: is a \
                 list where text is expected",
            ),
            ("", "request: the body is empty: send a JSON object, at least {}"),
            (
                r#"{"vm_id":7,"config":{"cpu":"#,
                "vm_id: must be text: write \"7\"; request: is cut off: the body ends after 27 bytes (line 1, column 27), where a \
                 value has to follow, behind `{\"vm_id\":7,\"config\":{\"cpu\":`; send the whole of it",
            ),
            (r#""text""#, "request: is \"text\" where an object is expected: write { … }"),
        ] {
            assert_eq!(violations(json).as_deref(), Some(expected), "{json}");
        }
        let long = format!(r#"{{"config":{{"memory":{{"size_bytes":"{}"}}}}}}"#, "9".repeat(10_000));
        assert!(violations(&long).unwrap().len() < 200);
    }

    #[test]
    fn an_unknown_enum_value_is_reported_with_the_known_names() {
        let strict = JsonShapeInterceptor::new(vmm_proto::FILE_DESCRIPTOR_SET).unwrap();
        let payload =
            Payload::new(r#"{"state_filter":["VM_STATE_RUNNING","RUNNING"]}"#.into(), CodecFormat::Json);
        let message = strict.check(Some("/vmm.v1.VmService/ListVms"), &payload).unwrap_err().message.unwrap();
        assert!(message.starts_with("state_filter[1]: must be one of VM_STATE_CREATED, "), "{message}");
        assert!(message.ends_with("VM_STATE_SHUTDOWN, not \"RUNNING\""), "{message}");
    }

    #[test]
    fn every_duplicate_key_is_reported() {
        let message = violations(
            r#"{"vm_id":"a","vmId":"b","config":{"metadata":{"k":"1","k":"2","\u006b":"3","l":"4"},
                "storage":[{"options":{"format":"raw","format":"qcow2"}},{"options":{"format":"raw"}}]}}"#,
        );
        let expected = "vm_id: is given twice; leave one out; config.metadata.k: is given twice; leave one out; \
            config.metadata.k: is given twice; leave one out; \
            config.storage[0].options.format: is given twice; leave one out";
        assert_eq!(message.as_deref(), Some(expected));
    }

    #[test]
    fn the_number_of_entries_is_limited() {
        let list = |count: usize| format!(r#"{{"config":{{"storage":[{}]}}}}"#, vec!["{}"; count].join(","));
        assert_eq!(violations(&list(MAX_ENTRIES)), None);
        let message = violations(&list(300_000)).unwrap();
        assert!(message.starts_with("config.storage: has too many entries"), "{message}");
        let map: Vec<String> = (0..=MAX_ENTRIES).map(|n| format!(r#""{n}":"""#)).collect();
        let message = violations(&format!(r#"{{"config":{{"metadata":{{{}}}}}}}"#, map.join(","))).unwrap();
        assert!(message.starts_with("config.metadata: has too many entries"), "{message}");
    }

    #[test]
    fn other_codecs_and_methods_are_not_checked() {
        let strict = JsonShapeInterceptor::new(vmm_proto::FILE_DESCRIPTOR_SET).unwrap();
        let binary = Payload::new("[]".into(), CodecFormat::Proto);
        assert!(strict.check(Some("/vmm.v1.VmService/CreateVm"), &binary).is_ok());
        let json = Payload::new("[]".into(), CodecFormat::Json);
        assert!(strict.check(Some("/other.Service/Method"), &json).is_ok());
    }
}
