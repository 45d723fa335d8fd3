//! TLS and users from a file in the format of Prometheus' exporter-toolkit, read again when it changes.
//!
//! Source of the format: <https://github.com/prometheus/exporter-toolkit/blob/master/docs/web-configuration.md>. An
//! unsupported setting is an error, because the operator would believe that it protects something.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Map, Value};
use serde_saphyr::UserMessageFormatter;
use strum::VariantArray as _;
use tokio::sync::{Mutex, watch};
use tokio::task::{self, JoinHandle};
use tokio::time::timeout;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::version::{TLS12, TLS13};
use tokio_rustls::rustls::{ServerConfig, SupportedProtocolVersion};
use tracing::{debug, info, warn};

use super::client_certificate::{ClientAuth, ClientRules};
use super::users::{Users, not_a_hash};
use crate::config::{
    self, MAX_CA_BYTES, MAX_FILE_BYTES, SensitiveAccess, read_regular, read_regular_text,
};
use crate::report::counted;

/// How the server is protected: TLS and users if a file sets them, and whether POST is allowed without either.
pub(crate) struct WebConfig {
    pub(super) enable_lifecycle: bool,
    pub(super) sensitive: SensitiveAccess,
    source: SecuritySource,
}

enum SecuritySource {
    /// No file is set: plain HTTP without users.
    None,
    File(WebConfigFile),
}

/// A web configuration file, and the certificate and key files that it names.
struct WebConfigFile {
    path: PathBuf,
    hasher: RandomState,
    current: watch::Sender<Arc<WebSecurity>>,
    /// Locked while the files are read, so that concurrent requests read them one after the other.
    last_read: Mutex<LastRead>,
}

struct LastRead {
    /// The hash of the last content, valid or not: each content is checked and logged once.
    content_hash: u64,
    /// A read that a request has started and not waited for, because it took longer than [`READ_TIMEOUT`].
    pending: Option<JoinHandle<Result<RawWebConfig, String>>>,
}

/// If the disk takes longer, the request continues with the previous version.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// What one version of the file requires of clients.
#[derive(Default)]
pub(super) struct WebSecurity {
    pub(super) tls: Option<Arc<ServerConfig>>,
    /// `None` if the file sets no users: every client may read.
    pub(super) users: Option<Users>,
    pub(super) client_auth: ClientAuth,
}

impl WebConfig {
    /// Reads the file that `http.web_config_file` names, if any.
    ///
    /// # Errors
    /// What is wrong with the file, or with the certificate and key that it names, as text for people and without secrets.
    pub(crate) fn load(http: &config::Http) -> Result<Self, String> {
        let source = match &http.web_config_file {
            None => SecuritySource::None,
            Some(path) => {
                let file = WebConfigFile::load(path).map_err(|error| in_file(path, &error))?;
                SecuritySource::File(file)
            }
        };
        Ok(Self {
            enable_lifecycle: http.enable_lifecycle,
            sensitive: http.sensitive,
            source,
        })
    }

    pub(crate) fn has_tls(&self) -> bool {
        self.latest().is_some_and(|security| security.tls.is_some())
    }

    pub(crate) fn has_users(&self) -> bool {
        self.latest()
            .is_some_and(|security| security.users.is_some())
    }

    pub(crate) fn has_client_certificates(&self) -> bool {
        self.latest()
            .is_some_and(|security| security.client_auth.identifies_every_client())
    }

    /// The version that was read last. `None` if no file is set.
    fn latest(&self) -> Option<Arc<WebSecurity>> {
        match &self.source {
            SecuritySource::None => None,
            SecuritySource::File(file) => Some(Arc::clone(&file.current.borrow())),
        }
    }

    /// What the file requires of clients, in a few words for people. `None` if no file is set.
    pub(crate) fn summary(&self) -> Option<String> {
        let security = self.latest()?;
        let mut parts = vec![if security.tls.is_some() {
            "TLS".to_owned()
        } else {
            "plain HTTP".to_owned()
        }];
        if security.client_auth != ClientAuth::default() {
            parts.push(security.client_auth.name().to_owned());
        }
        let users = security.users.as_ref().map_or(0, Users::count);
        parts.push(counted(users as u64, "user"));
        Some(parts.join(", "))
    }

    /// The version that is in effect now. The files are read at each call: they are small, and a modification time can miss a
    /// change.
    pub(super) async fn current(&self) -> Arc<WebSecurity> {
        match &self.source {
            SecuritySource::None => Arc::new(WebSecurity::default()),
            SecuritySource::File(file) => file.current().await,
        }
    }
}

fn in_file(path: &Path, error: &str) -> String {
    format!("{}: {error}", path.display())
}

impl WebConfigFile {
    fn load(path: &Path) -> Result<Self, String> {
        let hasher = RandomState::new();
        let read = RawWebConfig::read(path);
        let content_hash = hasher.hash_one(&read);
        let security = read?.into_security()?;
        Ok(Self {
            path: path.to_owned(),
            hasher,
            current: watch::Sender::new(Arc::new(security)),
            last_read: Mutex::new(LastRead {
                content_hash,
                pending: None,
            }),
        })
    }

    async fn current(&self) -> Arc<WebSecurity> {
        if timeout(READ_TIMEOUT, self.reload()).await.is_err() {
            debug!(
                "{}: reading takes longer than {READ_TIMEOUT:?}; the previous version stays in effect",
                self.path.display()
            );
        }
        Arc::clone(&self.current.borrow())
    }

    async fn reload(&self) {
        let mut last = self.last_read.lock().await;
        if let Some(pending) = &mut last.pending {
            // It may have started before the last change of the file, so its content is dropped.
            pending.await.ok();
        }
        let path = self.path.clone();
        let reading = task::spawn_blocking(move || RawWebConfig::read(&path));
        let read = last.pending.insert(reading).await;
        last.pending = None;
        let Ok(read) = read else { return };
        let content_hash = self.hasher.hash_one(&read);
        if content_hash != last.content_hash {
            last.content_hash = content_hash;
            self.apply(read);
        }
    }

    /// Replaces the current version, unless the new one has an error.
    fn apply(&self, read: Result<RawWebConfig, String>) {
        let current = Arc::clone(&self.current.borrow());
        let accepted = read
            .and_then(RawWebConfig::into_security)
            .and_then(|new| current.may_become(&new).map(|()| new));
        match accepted {
            Ok(new) => {
                self.current.send_replace(Arc::new(new));
                info!(file = %self.path.display(), "web configuration reloaded");
            }
            Err(error) => warn!(
                "{}; the previous version stays in effect",
                in_file(&self.path, &error)
            ),
        }
    }
}

impl WebSecurity {
    /// A file that is being written can be empty for a moment, which must not remove the protection.
    fn may_become(&self, new: &Self) -> Result<(), String> {
        let what = if self.users.is_some() && new.users.is_none() {
            "basic_auth_users cannot be removed"
        } else if self.tls.is_some() != new.tls.is_some() {
            "tls_server_config cannot be added or removed"
        } else if self.client_auth != ClientAuth::default()
            && new.client_auth == ClientAuth::default()
        {
            "client_auth_type cannot be removed"
        } else {
            return Ok(());
        };
        Err(format!("{what} while the canary runs; restart it"))
    }
}

/// The content of the files. Without `Debug`, because it includes the private key.
#[derive(Hash)]
struct RawWebConfig {
    users: BTreeMap<String, String>,
    tls: Option<RawTls>,
}

#[derive(Hash)]
struct RawTls {
    certificate_file: PathBuf,
    certificate: Vec<u8>,
    key_file: PathBuf,
    key: Vec<u8>,
    /// Whether TLS 1.2 is refused.
    only_tls13: bool,
    clients: ClientRules,
}

/// Sections that exporter-toolkit has and the canary does not support.
const UNSUPPORTED: &[&str] = &["http_server_config", "rate_limit"];
/// Keys below `tls_server_config` that exporter-toolkit has and the canary does not support.
const UNSUPPORTED_TLS: &[&str] = &[
    "cert",
    "cipher_suites",
    "client_ca",
    "curve_preferences",
    "key",
    "max_version",
    "prefer_server_cipher_suites",
];

impl RawWebConfig {
    fn read(path: &Path) -> Result<Self, String> {
        let yaml = read_regular_text(path, MAX_FILE_BYTES)
            .map_err(|error| format!("cannot be read: {error}"))?;
        let mut root = parse(&yaml)?;
        let tls = match root.remove("tls_server_config") {
            None | Some(Value::Null) => None,
            Some(section) => Some(RawTls::read(section, path)?),
        };
        let users = match root.remove("basic_auth_users") {
            None | Some(Value::Null) => BTreeMap::new(),
            Some(section) => users(section)?,
        };
        expect_empty(
            &root,
            "",
            "tls_server_config and basic_auth_users",
            UNSUPPORTED,
        )?;
        if tls.is_none() && users.is_empty() {
            return Err(
                "sets neither tls_server_config nor basic_auth_users, so it protects nothing; \
                 to serve plain HTTP without users, remove http.web_config_file"
                    .to_owned(),
            );
        }
        Ok(Self { users, tls })
    }

    fn into_security(self) -> Result<WebSecurity, String> {
        let users = Users::new(self.users)?;
        let client_auth = self.tls.as_ref().map(|tls| tls.clients.auth);
        Ok(WebSecurity {
            client_auth: client_auth.unwrap_or_default(),
            tls: self.tls.map(RawTls::into_server_config).transpose()?,
            users: (!users.is_empty()).then_some(users),
        })
    }
}

fn parse(yaml: &str) -> Result<Map<String, Value>, String> {
    // The error must not quote the file, which holds hashes.
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

fn texts(list: Value) -> Option<Vec<String>> {
    let Value::Array(list) = list else {
        return None;
    };
    let texts = list.into_iter().map(|value| match value {
        Value::String(text) => Some(text),
        _ => None,
    });
    texts.collect()
}

/// An error for the first remaining key, because it would have no effect.
fn expect_empty(
    section: &Map<String, Value>,
    prefix: &str,
    supported: &str,
    unsupported: &[&str],
) -> Result<(), String> {
    let Some(key) = section.keys().next() else {
        return Ok(());
    };
    let problem = if unsupported.contains(&key.as_str()) {
        "is not supported"
    } else {
        "is an unknown key"
    };
    Err(format!("{prefix}{key} {problem}; use {supported}"))
}

impl RawTls {
    fn read(section: Value, path: &Path) -> Result<Self, String> {
        const PREFIX: &str = "tls_server_config.";
        let Value::Object(mut section) = section else {
            return Err("tls_server_config: not a mapping of settings".to_owned());
        };
        let mut text = |key: &str| match section.remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(format!("{PREFIX}{key}: not a string")),
        };
        let certificate = text("cert_file")?;
        let key = text("key_file")?;
        let min_version = text("min_version")?;
        let client_auth = text("client_auth_type")?;
        let client_authority = text("client_ca_file")?;
        let allowed_sans = match section.remove("client_allowed_sans") {
            None | Some(Value::Null) => None,
            Some(names) => Some(
                texts(names)
                    .ok_or_else(|| format!("{PREFIX}client_allowed_sans: not a list of strings"))?,
            ),
        };
        expect_empty(
            &section,
            PREFIX,
            "cert_file, key_file, min_version, client_auth_type, client_ca_file and client_allowed_sans",
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
        let auth = match client_auth.as_deref() {
            None | Some("") => ClientAuth::default(),
            Some(name) => ClientAuth::parse(name).ok_or_else(|| {
                let names = ClientAuth::VARIANTS.iter().map(|auth| auth.name());
                let names: Vec<_> = names.collect();
                format!(
                    "{PREFIX}client_auth_type: {name:?} is none of {}",
                    names.join(", ")
                )
            })?,
        };
        // File names are relative to the folder of the web configuration file.
        let file = |key: &str, name: Option<String>| {
            let name = name.ok_or_else(|| format!("{PREFIX}{key} is missing"))?;
            let file = path.parent().unwrap_or(Path::new("")).join(name);
            let content = read_regular(&file, MAX_CA_BYTES).map_err(|error| {
                format!("{PREFIX}{key}: {} cannot be read: {error}", file.display())
            })?;
            Ok::<_, String>((file, content))
        };
        let (certificate_file, certificate) = file("cert_file", certificate)?;
        let (key_file, key) = file("key_file", key)?;
        let authority = match client_authority {
            None => None,
            name => Some(file("client_ca_file", name)?.1),
        };
        Ok(Self {
            certificate_file,
            certificate,
            key_file,
            key,
            only_tls13,
            clients: ClientRules {
                auth,
                authority,
                allowed_sans,
            },
        })
    }

    /// Names the crypto provider instead of using the process's default, which another dependency could change.
    fn into_server_config(self) -> Result<Arc<ServerConfig>, String> {
        const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
        let (certificate_file, key_file) =
            (self.certificate_file.display(), self.key_file.display());
        let chain = CertificateDer::pem_slice_iter(&self.certificate)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("{certificate_file} is not valid PEM: {error}"))?;
        if chain.is_empty() {
            return Err(format!("{certificate_file} has no PEM certificate"));
        }
        // This error describes the expected format and quotes nothing of the file.
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| format!("{key_file} has no usable PEM key: {error}"))?;
        let versions = if self.only_tls13 {
            &VERSIONS[..1]
        } else {
            &VERSIONS
        };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let clients = self.clients.verifier(&provider);
        let clients = clients.map_err(|error| format!("tls_server_config.{error}"))?;
        let builder = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|error| error.to_string())?;
        let builder = match clients {
            Some(verifier) => builder.with_client_cert_verifier(verifier),
            None => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|error| {
            format!("{certificate_file} and {key_file} cannot be used together: {error}")
        })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex as Lock;
    use std::{fs, io};

    use proptest::prelude::*;
    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct CapturedLog(Arc<Lock<Vec<u8>>>);

    impl io::Write for CapturedLog {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl MakeWriter<'_> for CapturedLog {
        type Writer = Self;

        fn make_writer(&self) -> Self {
            self.clone()
        }
    }

    impl CapturedLog {
        /// The lines since the previous call.
        fn take(&self) -> Vec<String> {
            let bytes = std::mem::take(&mut *self.0.lock().unwrap());
            let text = String::from_utf8(bytes).unwrap();
            text.lines().map(str::to_owned).collect()
        }
    }

    #[tokio::test]
    async fn new_version_is_logged_once_and_without_its_hashes() {
        let log = CapturedLog::default();
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
        for (text, expected) in [
            (users(&hash), None),
            (users(&hash[1..]), Some("not a bcrypt hash")),
            (String::new(), Some("protects nothing")),
            (users(&bcrypt::hash("other", 4).unwrap()), Some("reloaded")),
        ] {
            fs::write(&path, text).unwrap();
            for _ in 0..3 {
                web.current().await;
            }
            let lines = log.take();
            assert_eq!(lines.len(), usize::from(expected.is_some()), "{lines:?}");
            for line in &lines {
                assert!(expected.is_some_and(|text| line.contains(text)), "{line}");
                assert!(!line.contains(&hash[7..]), "{line}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn disk_that_does_not_respond_delays_no_request_for_longer_than_the_timeout() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.yml");
        let users = |name: &str| {
            let hash = bcrypt::hash("secret", 4).unwrap();
            format!("basic_auth_users: {{ {name}: \"{hash}\" }}")
        };
        fs::write(&path, users("alice")).unwrap();
        let file = WebConfigFile::load(&path).unwrap();
        let alice = file.current().await;

        fs::write(&path, users("bob")).unwrap();
        let (disk, response) = tokio::sync::oneshot::channel::<()>();
        file.last_read.lock().await.pending = Some(tokio::spawn(async {
            response.await.ok();
            Err("content that the file no longer has".to_owned())
        }));
        for _ in 0..2 {
            let before = tokio::time::Instant::now();
            assert!(Arc::ptr_eq(&alice, &file.current().await));
            assert_eq!(before.elapsed(), READ_TIMEOUT);
        }
        drop(disk);
        assert!(!Arc::ptr_eq(&alice, &file.current().await));
    }

    proptest! {
        #![proptest_config(proptest::test_runner::Config {
            failure_persistence: None,
            ..Default::default()
        })]

        #[test]
        fn file_with_any_text_is_accepted_or_refused_with_a_reason(text in prop_oneof![
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
            if let Err(error) = WebConfig::load(&http) {
                prop_assert!(error.contains("web.yml: ") && error.len() < 2000, "{error}");
            }
        }
    }
}
