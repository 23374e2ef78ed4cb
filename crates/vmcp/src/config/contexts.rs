//! The contexts file: servers by name.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use serde::Deserialize;

use super::{Environment, Server, TlsFiles};
use crate::failure::Failure;

/// The contexts file. A missing file has no contexts.
#[derive(Debug, Default)]
pub(crate) struct Contexts {
    path: PathBuf,
    file: File,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    current: Option<String>,
    #[serde(default)]
    contexts: BTreeMap<String, Context>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Context {
    server: String,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
}

impl Contexts {
    /// Reads the contexts file.
    ///
    /// # Errors
    ///
    /// The file is there and cannot be read, or is not TOML of the form that `docs/vmcp.md` shows.
    pub(crate) fn read(environment: &Environment) -> Result<Self, Failure> {
        let Some(path) = environment.file() else { return Ok(Self::default()) };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(Failure::Local(format!("{}: {error}", path.display()))),
        };
        let file = toml::from_str(&text).map_err(|error| {
            Failure::input(format!("{}: {}", path.display(), error.to_string().trim_end()))
        })?;
        Ok(Self { path, file })
    }

    /// Returns the name of the context that counts where none is chosen.
    pub(crate) fn current(&self) -> Option<&str> {
        self.file.current.as_deref()
    }

    /// Returns the names of all contexts.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.file.contexts.keys().map(String::as_str)
    }

    /// Returns the server of a context. The files of TLS that `stronger` has count before those of
    /// the context.
    ///
    /// # Errors
    ///
    /// No context has the name, or its URL is not one that this program can use.
    pub(crate) fn server(&self, name: &str, stronger: TlsFiles) -> Result<Server, Failure> {
        match self.file.contexts.get(name) {
            Some(context) => {
                let Context { server, ca, cert, key } = context;
                let own = TlsFiles { ca: ca.clone(), certificate: cert.clone(), key: key.clone() };
                let source = format!("context {name} in {}", self.path.display());
                Server::parse(server, &source, stronger.or(own))
            }
            None => Err(Failure::input(format!("no context is named \"{name}\"")).with_remedy(self.advice())),
        }
    }

    fn advice(&self) -> String {
        if self.file.contexts.is_empty() {
            return "the contexts file has none; docs/vmcp.md shows its form".to_owned();
        }
        format!("the contexts there are: {}", self.names().collect::<Vec<_>>().join(", "))
    }
}
