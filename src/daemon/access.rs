//! A project's way to its server, with the key pair and the certificates that its files hold now.
//!
//! Each batch asks for it when it starts, so that a rotated secret is in use at the next batch without a reload. A file that
//! cannot be read changes nothing: the batch uses what was read before, and the log says so.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::task::{self, JoinHandle};
use tokio::time::timeout;

use crate::config::{MAX_CA_BYTES, Project, read_regular};
use crate::livekit::wire;
use crate::livekit::wire::api::Api;
use crate::livekit::wire::connect::Endpoint;

/// If the disk takes longer, the batch starts with what was read before.
const READ_TIMEOUT: Duration = Duration::from_secs(5);

/// What a batch needs to reach the server.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) project: Arc<Project>,
    pub(super) endpoint: Endpoint,
    pub(super) api: Api,
}

impl Access {
    /// # Errors
    /// See [`wire::access`].
    fn new(project: Project) -> anyhow::Result<Self> {
        let (endpoint, api) = wire::access(&project)?;
        Ok(Self {
            project: Arc::new(project),
            endpoint,
            api,
        })
    }
}

/// The access of one project, which all of its batches share.
pub(super) struct ProjectAccess {
    name: String,
    state: Mutex<AccessState>,
}

struct AccessState {
    access: Access,
    ca: Option<Vec<u8>>,
    /// A read that took longer than [`READ_TIMEOUT`]. Until it ends there is no other one.
    pending: Option<JoinHandle<Result<FileContents, String>>>,
}

/// The project with the key pair of its files, and the content of `ca_file`.
type FileContents = (Project, Option<Vec<u8>>);

impl ProjectAccess {
    /// Blocks on the disk.
    ///
    /// # Errors
    /// See [`wire::access`].
    pub(super) fn new(name: &str, project: &Project) -> anyhow::Result<Self> {
        let ca = project.ca_file.as_deref();
        let ca = ca
            .map(|path| read_regular(path, MAX_CA_BYTES))
            .transpose()?;
        Ok(Self {
            name: name.to_owned(),
            state: Mutex::new(AccessState {
                access: Access::new(project.clone())?,
                ca,
                pending: None,
            }),
        })
    }

    /// Reads the project's files again, and returns the access with their content.
    pub(super) async fn current(&self) -> Access {
        let mut state = self.state.lock().await;
        if let Err(why) = state.refresh(&self.name).await {
            tracing::warn!(
                project = self.name,
                "project {}: {why}; the previous credentials stay in use",
                self.name
            );
        }
        state.access.clone()
    }
}

impl AccessState {
    async fn refresh(&mut self, name: &str) -> Result<(), String> {
        let project = Arc::clone(&self.access.project);
        let files = &project.credential_files;
        if files.api_key.is_none() && files.api_secret.is_none() && project.ca_file.is_none() {
            return Ok(());
        }
        let reading = match self.pending.take() {
            Some(reading) if !reading.is_finished() => {
                self.pending = Some(reading);
                return Err("the disk still does not respond".to_owned());
            }
            // Its content may be older than the last change of the files.
            _ => {
                let project = Arc::clone(&project);
                task::spawn_blocking(move || file_contents(&project))
            }
        };
        let reading = self.pending.insert(reading);
        let Ok(read) = timeout(READ_TIMEOUT, reading).await else {
            return Err(format!("its files cannot be read within {READ_TIMEOUT:?}"));
        };
        self.pending = None;
        let (current, ca) =
            read.map_err(|error| format!("its files cannot be read: {error}"))??;
        if current == *project && ca == self.ca {
            return Ok(());
        }
        self.access = Access::new(current).map_err(|error| format!("{error:#}"))?;
        self.ca = ca;
        tracing::info!(
            project = name,
            "project {name}: the files of its credentials have changed; new batches use their content"
        );
        Ok(())
    }
}

fn file_contents(project: &Project) -> Result<FileContents, String> {
    let current = project.with_current_credentials()?;
    let ca = project.ca_file.as_deref();
    let ca = ca.map(|path| read_regular(path, MAX_CA_BYTES)).transpose();
    let ca = ca.map_err(|error| format!("ca_file: can't read this file: {error}"))?;
    Ok((current, ca))
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;
    use crate::config::CredentialFiles;
    use crate::report::sample::project;

    #[tokio::test]
    async fn rotated_secret_is_in_the_next_access_and_a_broken_file_keeps_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("secret");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        write("first\n");
        let project = Project {
            credential_files: CredentialFiles {
                api_key: None,
                api_secret: Some(file.clone()),
            },
            api_secret: "first".into(),
            ..project()
        };
        let access = ProjectAccess::new("main", &project).unwrap();
        let secret = async || {
            let current = access.current().await;
            current.project.api_secret.expose_secret().to_owned()
        };
        assert_eq!(secret().await, "first");
        write("second\n");
        assert_eq!(secret().await, "second");
        for broken in ["", "two\nlines\n"] {
            write(broken);
            assert_eq!(secret().await, "second", "{broken:?}");
        }
        std::fs::remove_file(&file).unwrap();
        assert_eq!(secret().await, "second");
        write("third");
        assert_eq!(secret().await, "third");
    }
}
