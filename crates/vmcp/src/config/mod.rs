//! The choice of the server: the command line, the environment, or the contexts file.
//!
//! The first of these that is there counts:
//!
//! ```text
//!   --server URL ► --context NAME ► VMCP_SERVER ► VMCP_CONTEXT ► `current` of the contexts file
//!                                                             ► http://127.0.0.1:8080
//! ```

mod contexts;
mod server;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub(crate) use contexts::Contexts;
pub(crate) use server::{Endpoint, Server, TlsFiles};

use crate::failure::Failure;

/// The variable that names a server.
pub(crate) const SERVER_VARIABLE: &str = "VMCP_SERVER";
/// The variable that names a context.
pub(crate) const CONTEXT_VARIABLE: &str = "VMCP_CONTEXT";
/// The variable that names the contexts file. The name is not `VMCP_CONFIG`, because the daemon
/// reads that variable as the path of its own configuration file.
pub(crate) const FILE_VARIABLE: &str = "VMCP_CONTEXTS_FILE";
/// The variable that names the file of the authorities that are trusted.
pub(crate) const CA_VARIABLE: &str = "VMCP_CA";
/// The variable that names the file of the client's certificate.
pub(crate) const CERT_VARIABLE: &str = "VMCP_CERT";
/// The variable that names the file of the key of the client's certificate.
pub(crate) const KEY_VARIABLE: &str = "VMCP_KEY";
/// The server of a user who names none: the daemon's default address on this host.
pub(crate) const DEFAULT_SERVER: &str = "http://127.0.0.1:8080";

/// The environment, as far as this program reads it. An empty variable counts as unset.
#[derive(Debug, Default)]
pub(crate) struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Reads the environment of this process.
    pub(crate) fn of_this_process() -> Self {
        Self::from_pairs(
            std::env::vars_os()
                .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?))),
        )
    }

    fn from_pairs(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        Self(pairs.into_iter().filter(|(_, value)| !value.is_empty()).collect())
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    /// Returns the files of TLS that the variables name.
    fn tls(&self) -> TlsFiles {
        let file = |variable| self.get(variable).map(PathBuf::from);
        TlsFiles { ca: file(CA_VARIABLE), certificate: file(CERT_VARIABLE), key: file(KEY_VARIABLE) }
    }

    /// Returns the contexts file: the one that the variable names, or the user's own.
    fn file(&self) -> Option<PathBuf> {
        let own = || {
            let folder = self.get("XDG_CONFIG_HOME").map(PathBuf::from);
            folder.or_else(|| self.get("HOME").map(|home| PathBuf::from(home).join(".config")))
        };
        self.get(FILE_VARIABLE)
            .map(PathBuf::from)
            .or_else(|| own().map(|folder| folder.join("vmcp").join("config.toml")))
    }
}

/// Returns the server, and its files of TLS, that the arguments, the environment and the contexts file choose.
///
/// # Errors
///
/// The URL is not one that this program can use, no context has the name, or the contexts file
/// cannot be read.
pub(crate) fn choose(
    server: Option<&str>,
    context: Option<&str>,
    tls: TlsFiles,
    environment: &Environment,
) -> Result<Server, Failure> {
    let tls = tls.or(environment.tls());
    if let Some(url) = server {
        return Server::parse(url, "--server", tls);
    }
    if let Some(name) = context {
        return Contexts::read(environment)?.server(name, tls);
    }
    if let Some(url) = environment.get(SERVER_VARIABLE) {
        return Server::parse(url, SERVER_VARIABLE, tls);
    }
    let contexts = Contexts::read(environment)?;
    match environment.get(CONTEXT_VARIABLE).or(contexts.current()) {
        Some(name) => contexts.server(name, tls),
        None => Server::parse(DEFAULT_SERVER, "the default", tls),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "current = \"lab\"\n\
                        [contexts.lab]\nserver = \"http://lab:8080\"\n\
                        [contexts.far]\nserver = \"http://far:9000/\"\n";

    fn environment(dir: &tempfile::TempDir, pairs: &[(&str, &str)]) -> Environment {
        let file = dir.path().join("config.toml").display().to_string();
        let own = [(FILE_VARIABLE.to_owned(), file)];
        let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Environment::from_pairs(own.into_iter().chain(pairs))
    }

    fn with_file(text: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.toml"), text).unwrap();
        dir
    }

    #[test]
    fn a_flag_overrides_the_environment_which_overrides_the_file() {
        let dir = with_file(FILE);
        let both = environment(&dir, &[(SERVER_VARIABLE, "http://env:1"), (CONTEXT_VARIABLE, "far")]);
        let chosen = |server, context, environment: &Environment| {
            choose(server, context, TlsFiles::default(), environment).unwrap().to_string()
        };
        assert_eq!(chosen(Some("http://typed:1"), Some("lab"), &both), "http://typed:1");
        assert_eq!(chosen(None, Some("lab"), &both), "http://lab:8080");
        assert_eq!(chosen(None, None, &both), "http://env:1");
        assert_eq!(chosen(None, None, &environment(&dir, &[(CONTEXT_VARIABLE, "far")])), "http://far:9000");
        assert_eq!(chosen(None, None, &environment(&dir, &[])), "http://lab:8080");
        let nothing = tempfile::tempdir().unwrap();
        assert_eq!(chosen(None, None, &environment(&nothing, &[(SERVER_VARIABLE, "")])), DEFAULT_SERVER);
    }

    #[test]
    fn an_unknown_context_is_refused_with_the_known_contexts() {
        let dir = with_file(FILE);
        let error = choose(None, Some("lap"), TlsFiles::default(), &environment(&dir, &[])).unwrap_err();
        let Failure::Input { message, remedy } = error else { panic!("{error:?}") };
        assert!(message.contains("no context is named \"lap\""), "{message}");
        assert_eq!(remedy.as_deref(), Some("the contexts there are: far, lab"));
    }

    #[test]
    fn the_configuration_file_of_the_daemon_is_not_read() {
        let dir = with_file("port = 9000\n");
        let file = dir.path().join("config.toml").display().to_string();
        for variable in ["VMCP_CONFIG", "UNKEY_VMCP_CONFIG"] {
            let environment = Environment::from_pairs([(variable.to_owned(), file.clone())]);
            assert_eq!(
                choose(None, None, TlsFiles::default(), &environment).unwrap().to_string(),
                DEFAULT_SERVER,
                "{variable}"
            );
        }
    }

    #[test]
    fn a_configuration_file_with_an_unknown_key_is_refused_with_the_line() {
        let dir = with_file("current = \"lab\"\n[contexts.lab]\nsever = \"http://lab:8080\"\n");
        let error = choose(None, None, TlsFiles::default(), &environment(&dir, &[])).unwrap_err().to_string();
        assert!(error.contains("line 3") && error.contains("sever"), "{error}");
    }

    #[test]
    fn the_configuration_file_defaults_to_the_users_folder() {
        let pairs = |pairs: &[(&str, &str)]| {
            Environment::from_pairs(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))).file()
        };
        assert_eq!(pairs(&[("HOME", "/h")]), Some("/h/.config/vmcp/config.toml".into()));
        assert_eq!(pairs(&[("HOME", "/h"), ("XDG_CONFIG_HOME", "/x")]), Some("/x/vmcp/config.toml".into()));
        assert_eq!(pairs(&[]), None);
    }
}
