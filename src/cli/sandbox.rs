//! `sandbox`: runs a LiveKit server with a demo agent on loopback until a signal stops it.

use secrecy::{ExposeSecret, SecretString};
use tokio_util::sync::CancellationToken;

use super::{Exit, SandboxArgs, print};
use crate::sandbox::{Sandbox, SandboxSettings};
use crate::telemetry;

pub(super) fn run(args: &SandboxArgs) -> anyhow::Result<Exit> {
    telemetry::log_to(std::io::stderr, false, "warn");
    super::runtime()?.block_on(serve(args))
}

async fn serve(args: &SandboxArgs) -> anyhow::Result<Exit> {
    let defaults = SandboxSettings::default();
    let settings = SandboxSettings {
        port: args.port,
        agent_name: args.agent_name.clone(),
        faults: args.faults.clone(),
        report: args.report.clone(),
        ..defaults
    };
    let sandbox = Sandbox::bind(settings).await?;
    print(&introduction(
        &sandbox.url(),
        sandbox.api_key(),
        sandbox.api_secret(),
    ))?;
    let shutdown = CancellationToken::new();
    let serving = sandbox.run(shutdown.clone());
    tokio::pin!(serving);
    tokio::select! {
        () = &mut serving => {}
        signal = stop_signal() => {
            signal?;
            shutdown.cancel();
            serving.await;
        }
    }
    Ok(Exit::Ok)
}

/// What a shell needs to reach the sandbox. The key pair is the sandbox's own and valid only on this loopback port, so
/// printing it is safe.
fn introduction(url: &str, key: &str, secret: &SecretString) -> String {
    format!(
        "LIVEKIT_URL={url}\nLIVEKIT_API_KEY={key}\nLIVEKIT_API_SECRET={}\n",
        secret.expose_secret()
    )
}

/// Waits for Ctrl-C or SIGTERM.
async fn stop_signal() -> std::io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}
