//! The plain values in JSON requests: numbers, texts, truth values and names of enums.

use std::fmt::Display;

use buffa::json_helpers::{double, int32, int64, proto_bool, proto_string, uint32, uint64};
use buffa_descriptor::{EnumDescriptor, ScalarType};
use serde::de::{self, Deserialize, Deserializer};

use super::error::sendable_text;

/// The longest part of a value that an error quotes.
const MAX_QUOTED: usize = 64;

/// A type of the `.proto` that is no message, no list and no map.
#[derive(Clone, Copy)]
pub(super) enum PlainType<'a> {
    Scalar(ScalarType),
    Enum(&'a EnumDescriptor),
}

impl PlainType<'_> {
    /// Describes the expected value, with its article.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Enum(_) => "the name of a value",
            Self::Scalar(ScalarType::Bool) => "true or false",
            Self::Scalar(ScalarType::String) => "text",
            Self::Scalar(ScalarType::Bytes) => "base64",
            Self::Scalar(_) => "a number",
        }
    }

    /// Returns the error about a value, or nothing if the decoder accepts the value. `given` is the
    /// value as the client spelt it.
    pub(super) fn objection<'de, D>(self, given: &dyn Display, json: D) -> Option<String>
    where
        D: Deserializer<'de, Error = de::value::Error>,
    {
        let taken = match self {
            Self::Enum(names) => takes_enum(names, json),
            Self::Scalar(scalar) => takes(scalar, json),
        };
        let given = shortened(given);
        (!taken).then(|| match self {
            Self::Enum(names) => {
                // UNSPECIFIED means that no value was given, so that it is no value to choose.
                let names: Vec<&str> = names
                    .values()
                    .iter()
                    .map(|value| value.name())
                    .filter(|name| !name.ends_with("_UNSPECIFIED"))
                    .collect();
                format!("must be one of {}, not {given}", names.join(", "))
            }
            Self::Scalar(ScalarType::Bool) => format!("must be true or false, not {given}"),
            Self::Scalar(ScalarType::String) => format!("must be text: write \"{given}\""),
            Self::Scalar(ScalarType::Bytes) => format!("must be base64, not {given}"),
            Self::Scalar(ScalarType::Double | ScalarType::Float) => format!("must be a number, not {given}"),
            Self::Scalar(scalar) => {
                format!("must be a whole number of at most {} bits, not {given}", bits(scalar))
            }
        })
    }
}

/// Calls the decoder's own functions, so that every value that the decoder accepts is accepted
/// here.
fn takes<'de, D>(scalar: ScalarType, json: D) -> bool
where
    D: Deserializer<'de, Error = de::value::Error>,
{
    match scalar {
        ScalarType::Bool => proto_bool::deserialize(json).is_ok(),
        ScalarType::String => proto_string::deserialize::<String, _>(json).is_ok(),
        ScalarType::Int32 | ScalarType::Sint32 | ScalarType::Sfixed32 => int32::deserialize(json).is_ok(),
        ScalarType::Int64 | ScalarType::Sint64 | ScalarType::Sfixed64 => int64::deserialize(json).is_ok(),
        ScalarType::Uint32 | ScalarType::Fixed32 => uint32::deserialize(json).is_ok(),
        ScalarType::Uint64 | ScalarType::Fixed64 => uint64::deserialize(json).is_ok(),
        ScalarType::Double | ScalarType::Float => double::deserialize(json).is_ok(),
        // The decoder itself checks that a text is base64.
        ScalarType::Bytes => String::deserialize(json).is_ok(),
    }
}

/// Returns true for the name of a value and for any 32-bit number. A number that is no value of the
/// enum passes, because the service refuses it with the list of names.
fn takes_enum<'de, D>(names: &EnumDescriptor, json: D) -> bool
where
    D: Deserializer<'de, Error = de::value::Error>,
{
    match serde_json::Value::deserialize(json) {
        Ok(serde_json::Value::String(name)) => names.values().iter().any(|value| value.name() == name),
        Ok(serde_json::Value::Number(number)) => {
            number.as_i64().is_some_and(|number| i32::try_from(number).is_ok())
        }
        Ok(_) | Err(_) => false,
    }
}

const fn bits(scalar: ScalarType) -> u32 {
    match scalar {
        ScalarType::Int64
        | ScalarType::Sint64
        | ScalarType::Sfixed64
        | ScalarType::Uint64
        | ScalarType::Fixed64 => 64,
        _ => 32,
    }
}

/// Returns a value as the client spelt it, shortened for an error message.
pub(super) fn shortened(given: &dyn Display) -> String {
    sendable_text(given.to_string(), MAX_QUOTED)
}
