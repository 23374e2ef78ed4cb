//! Tables of words: an enum whose variants are words on the wire and in records.
//!
//! Clients read the words, and earlier releases have written them into records. Therefore a word
//! never changes. A word of another release is kept as it is. Code compares variants, never words.

macro_rules! word_table {
    ($(#[$meta:meta])* $table:ident { $($(#[$doc:meta])* $name:ident = $word:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum $table {
            $($(#[$doc])* $name,)*
            /// A word of another release that this one does not know. Only read, never made.
            Other(Box<str>),
        }

        impl $table {
            /// Every word that this release writes.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Returns the word on the wire and in records.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$name => $word,)*
                    Self::Other(word) => word,
                }
            }

            fn read(word: &str) -> Self {
                match word {
                    $($word => Self::$name,)*
                    other => Self::Other(other.into()),
                }
            }
        }

        impl std::fmt::Display for $table {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl serde::Serialize for $table {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $table {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Ok(Self::read(&<String as serde::Deserialize>::deserialize(deserializer)?))
            }
        }
    };
}

pub(crate) use word_table;
