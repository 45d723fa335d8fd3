//! Everything that crosses the network to LiveKit, excluding media: connections, HTTP requests, tokens, the server API, the
//! signal connection and what it offers for media. The module knows no room state and no audio.

use crate::config::Project;

pub mod api;
pub(crate) mod candidate;
pub mod connect;
pub mod request;
pub(crate) mod signal;
pub mod token;
pub(crate) mod turn;

/// The endpoint and the server API of a project. It connects to nothing yet.
///
/// # Errors
/// See [`Endpoint::new`](connect::Endpoint::new) and [`Keys::new`](token::Keys::new).
pub(crate) fn access(project: &Project) -> anyhow::Result<(connect::Endpoint, api::Api)> {
    let endpoint = connect::Endpoint::new(&project.url, project.ca_file.as_deref())?;
    let keys = token::Keys::new(project.api_key.clone(), project.api_secret.clone())?;
    let api = api::Api::new(endpoint.clone(), keys, project.api_timeout);
    Ok((endpoint, api))
}
