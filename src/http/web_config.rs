//! TLS and users from a file in the format of Prometheus' exporter-toolkit, read again whenever it has changed.
//!
//! Source of the format: <https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md>. What is
//! not supported is an error: a setting that protects nothing must not look as if it did.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{BuildHasher, Hash, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Map, Value};
use serde_saphyr::UserMessageFormatter;
use tokio::sync::{Mutex, watch};
use tokio::task::{self, JoinHandle};
use tokio::time::timeout;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ServerConfig, SupportedProtocolVersion};
use tracing::{debug, info, warn};

use super::users::{Users, not_a_hash};
use crate::config;

/// How HTTP is protected: TLS and users, if a file sets them, and whether POST needs neither.
pub struct WebConfig {
    pub(super) enable_lifecycle: bool,
    source: Source,
}

enum Source {
    /// No file is named: plain HTTP for everybody.
    None,
    File(Rotated),
}

/// A file and those that it names.
struct Rotated {
    path: PathBuf,
    hasher: RandomState,
    current: watch::Sender<Arc<Protection>>,
    /// Held while the files are read, so that many requests at once don't read them at once.
    state: Mutex<State>,
}

struct State {
    /// Stands for the content that was seen last, good or bad: each is judged, and logged, once.
    seen: u64,
    /// What a request that has given up left behind.
    reading: Option<JoinHandle<Result<Text, String>>>,
}

/// A disk that takes longer must not hold up who asks: what was read before holds until it answers.
const LONGEST_READ: Duration = Duration::from_secs(2);

/// What one version of the file asks for.
#[derive(Default)]
pub(super) struct Protection {
    pub(super) tls: Option<Arc<ServerConfig>>,
    /// `None` where there are none: everybody may ask.
    pub(super) users: Option<Users>,
}

impl WebConfig {
    /// Reads the file that `http.web_config_file` names, if any.
    ///
    /// # Errors
    /// What is wrong with the file, or with the certificate and key that it names: a text for people, without secrets.
    pub fn load(http: &config::Http) -> Result<Self, String> {
        let source = match &http.web_config_file {
            None => Source::None,
            Some(path) => Source::File(Rotated::load(path).map_err(|error| in_file(path, &error))?),
        };
        Ok(Self {
            enable_lifecycle: http.enable_lifecycle,
            source,
        })
    }

    /// What holds now. The files are read each time: they are small, and a time stamp can miss a change.
    pub(super) async fn current(&self) -> Arc<Protection> {
        match &self.source {
            Source::None => Arc::new(Protection::default()),
            Source::File(file) => file.current().await,
        }
    }
}

fn in_file(path: &Path, error: &str) -> String {
    format!("{}: {error}", path.display())
}

impl Rotated {
    fn load(path: &Path) -> Result<Self, String> {
        let hasher = RandomState::new();
        let read = Text::read(path);
        let seen = hasher.hash_one(&read);
        let protection = read?.protection()?;
        Ok(Self {
            path: path.to_owned(),
            hasher,
            current: watch::Sender::new(Arc::new(protection)),
            state: Mutex::new(State {
                seen,
                reading: None,
            }),
        })
    }

    async fn current(&self) -> Arc<Protection> {
        if timeout(LONGEST_READ, self.read_again()).await.is_err() {
            debug!("{}: not read within {LONGEST_READ:?}", self.path.display());
        }
        Arc::clone(&self.current.borrow())
    }

    async fn read_again(&self) {
        let mut state = self.state.lock().await;
        if let Some(reading) = &mut state.reading {
            // It may have begun before the last change, and counts for nothing.
            reading.await.ok();
        }
        let path = self.path.clone();
        let reading = task::spawn_blocking(move || Text::read(&path));
        let read = state.reading.insert(reading).await;
        state.reading = None;
        let Ok(read) = read else { return };
        let seen = self.hasher.hash_one(&read);
        if seen != state.seen {
            state.seen = seen;
            self.judge(read);
        }
    }

    fn judge(&self, read: Result<Text, String>) {
        let current = Arc::clone(&self.current.borrow());
        let accepted = read
            .and_then(Text::protection)
            .and_then(|new| current.may_become(&new).map(|()| new));
        match accepted {
            Ok(new) => {
                self.current.send_replace(Arc::new(new));
                info!(file = %self.path.display(), "web configuration read again");
            }
            Err(error) => warn!(
                "{}; what was read before stays in force",
                in_file(&self.path, &error)
            ),
        }
    }
}

impl Protection {
    /// A file that is being written is empty for a moment: that must not open what was closed.
    fn may_become(&self, new: &Self) -> Result<(), String> {
        let what = if self.users.is_some() && new.users.is_none() {
            "basic_auth_users can't be removed"
        } else if self.tls.is_some() != new.tls.is_some() {
            "tls_server_config can't be added or removed"
        } else {
            return Ok(());
        };
        Err(format!("{what} while the canary runs; restart it"))
    }
}

/// The content of the files, the key included: no `Debug`.
#[derive(Hash)]
struct Text {
    users: BTreeMap<String, String>,
    tls: Option<TlsText>,
}

#[derive(Hash)]
struct TlsText {
    certificate_file: PathBuf,
    certificate: Vec<u8>,
    key_file: PathBuf,
    key: Vec<u8>,
    /// Whether 1.2 is refused.
    only_tls13: bool,
}

/// Sections of exporter-toolkit that exist there, and not here.
const UNSUPPORTED: &[&str] = &["http_server_config", "rate_limit"];
/// The same below `tls_server_config`.
const UNSUPPORTED_TLS: &[&str] = &[
    "cert",
    "cipher_suites",
    "client_allowed_sans",
    "client_auth_type",
    "client_ca",
    "client_ca_file",
    "curve_preferences",
    "key",
    "max_version",
    "prefer_server_cipher_suites",
];

impl Text {
    fn read(path: &Path) -> Result<Self, String> {
        let yaml = fs::read_to_string(path).map_err(|error| format!("cannot be read: {error}"))?;
        let mut root = parse(&yaml)?;
        let tls = match root.remove("tls_server_config") {
            None | Some(Value::Null) => None,
            Some(section) => Some(TlsText::read(section, path)?),
        };
        let users = match root.remove("basic_auth_users") {
            None | Some(Value::Null) => BTreeMap::new(),
            Some(section) => users(section)?,
        };
        nothing_left(
            &root,
            "",
            "tls_server_config and basic_auth_users",
            UNSUPPORTED,
        )?;
        if tls.is_none() && users.is_empty() {
            return Err(
                "sets neither tls_server_config nor basic_auth_users, and so protects nothing; \
                 without http.web_config_file HTTP is open to everybody"
                    .to_owned(),
            );
        }
        Ok(Self { users, tls })
    }

    fn protection(self) -> Result<Protection, String> {
        let users = Users::new(self.users)?;
        Ok(Protection {
            tls: self.tls.map(TlsText::config).transpose()?,
            users: (!users.is_empty()).then_some(users),
        })
    }
}

fn parse(yaml: &str) -> Result<Map<String, Value>, String> {
    // A snippet of the file would show hashes.
    let options = serde_saphyr::options! { with_snippet: false };
    let root: Option<Value> =
        serde_saphyr::from_str_with_options(yaml, options).map_err(|error| {
            let text = error.render_with_formatter(&UserMessageFormatter);
            format!("not valid YAML: {text}")
        })?;
    match root {
        None | Some(Value::Null) => Ok(Map::new()),
        Some(Value::Object(root)) => Ok(root),
        Some(_) => Err("not a YAML mapping of settings".to_owned()),
    }
}

fn users(section: Value) -> Result<BTreeMap<String, String>, String> {
    let Value::Object(section) = section else {
        return Err("basic_auth_users: not a mapping of user names to bcrypt hashes".to_owned());
    };
    let users = section.into_iter().map(|(name, hash)| match hash {
        Value::String(hash) => Ok((name, hash)),
        _ => Err(not_a_hash(&name)),
    });
    users.collect()
}

/// An error for the first key that is still there: it sets what would not come about.
fn nothing_left(
    section: &Map<String, Value>,
    prefix: &str,
    supported: &str,
    unsupported: &[&str],
) -> Result<(), String> {
    let Some(key) = section.keys().next() else {
        return Ok(());
    };
    let verdict = if unsupported.contains(&key.as_str()) {
        "is not supported"
    } else {
        "is not a known key"
    };
    Err(format!("{prefix}{key} {verdict}; use {supported}"))
}

impl TlsText {
    fn read(section: Value, path: &Path) -> Result<Self, String> {
        const PREFIX: &str = "tls_server_config.";
        let Value::Object(mut section) = section else {
            return Err("tls_server_config: not a mapping of settings".to_owned());
        };
        let mut text = |key: &str| match section.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(format!("{PREFIX}{key}: not a text")),
        };
        let certificate = text("cert_file")?;
        let key = text("key_file")?;
        let min_version = text("min_version")?;
        nothing_left(
            &section,
            PREFIX,
            "cert_file, key_file and min_version",
            UNSUPPORTED_TLS,
        )?;
        let only_tls13 = match min_version.as_deref() {
            None | Some("TLS12") => false,
            Some("TLS13") => true,
            Some(other) => {
                return Err(format!(
                    "{PREFIX}min_version: {other:?} is neither \"TLS12\" nor \"TLS13\""
                ));
            }
        };
        // Relative to the folder of the file that names them.
        let file = |key: &str, name: Option<String>| {
            let name = name.ok_or_else(|| format!("{PREFIX}{key} is missing"))?;
            let file = path.parent().unwrap_or(Path::new("")).join(name);
            let content = fs::read(&file).map_err(|error| {
                format!("{PREFIX}{key}: {} cannot be read: {error}", file.display())
            })?;
            Ok::<_, String>((file, content))
        };
        let (certificate_file, certificate) = file("cert_file", certificate)?;
        let (key_file, key) = file("key_file", key)?;
        Ok(Self {
            certificate_file,
            certificate,
            key_file,
            key,
            only_tls13,
        })
    }

    /// The provider is named, never the process's default: a dependency that turns on a second one must change nothing.
    fn config(self) -> Result<Arc<ServerConfig>, String> {
        const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
        let (certificate_file, key_file) =
            (self.certificate_file.display(), self.key_file.display());
        let chain = CertificateDer::pem_slice_iter(&self.certificate)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("{certificate_file} is not valid PEM: {error}"))?;
        if chain.is_empty() {
            return Err(format!("{certificate_file} holds no PEM certificate"));
        }
        // The error of a key file says what was expected, and nothing of its content.
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| format!("{key_file} holds no usable PEM key: {error}"))?;
        let versions = if self.only_tls13 {
            &VERSIONS[..1]
        } else {
            &VERSIONS
        };
        let mut config =
            ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_protocol_versions(versions)
                .map_err(|error| error.to_string())?
                .with_no_client_auth()
                .with_single_cert(chain, key)
                .map_err(|error| {
                    format!("{certificate_file} and {key_file} can't be used together: {error}")
                })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex as Lock;

    use proptest::prelude::*;
    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Lock<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for Log {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    impl Log {
        /// The lines since the last call.
        fn take(&self) -> Vec<String> {
            let bytes = std::mem::take(&mut *self.0.lock().unwrap());
            let text = String::from_utf8(bytes).unwrap();
            text.lines().map(str::to_owned).collect()
        }
    }

    #[tokio::test]
    async fn new_version_is_logged_once_whether_good_or_broken_and_without_its_hashes() {
        let log = Log::default();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(log.clone())
            .finish();
        let _default = tracing::subscriber::set_default(subscriber);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.yml");
        let hash = bcrypt::hash("secret", 4).unwrap();
        let users = |hash: &str| format!("basic_auth_users: {{ alice: \"{hash}\" }}");
        fs::write(&path, users(&hash)).unwrap();
        let web = WebConfig::load(&config::Http {
            web_config_file: Some(path.clone()),
            ..config::Http::default()
        })
        .unwrap();
        for (text, said) in [
            (users(&hash), None),
            (users(&hash[1..]), Some("not a bcrypt hash")),
            (String::new(), Some("protects nothing")),
            (
                users(&bcrypt::hash("other", 4).unwrap()),
                Some("read again"),
            ),
        ] {
            fs::write(&path, text).unwrap();
            for _ in 0..3 {
                web.current().await;
            }
            let lines = log.take();
            assert_eq!(lines.len(), usize::from(said.is_some()), "{lines:?}");
            for line in &lines {
                assert!(said.is_some_and(|said| line.contains(said)), "{line}");
                assert!(!line.contains(&hash[7..]), "{line}");
            }
        }
    }

    proptest! {
        #![proptest_config(proptest::test_runner::Config {
            failure_persistence: None,
            ..Default::default()
        })]

        #[test]
        fn file_of_any_text_is_taken_or_refused_with_a_reason(text in prop_oneof![
            "\\PC{0,100}",
            "((tls_server_config|basic_auth_users|http_server_config|headers):|  [a-z_]{1,12}: [ -~]{0,16}|[&*!%@][ -~]{0,9}|\n){0,12}",
        ]) {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("web.yml");
            std::fs::write(&file, text).unwrap();
            let http = config::Http {
                web_config_file: Some(file),
                ..config::Http::default()
            };
            if let Err(told) = WebConfig::load(&http) {
                prop_assert!(told.contains("web.yml: ") && told.len() < 2000, "{told}");
            }
        }
    }
}
