//! `run`: starts the daemon with the settings, and turns signals into its commands.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context as _;
use chrono::Utc;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::stop_signals::StopSignals;
use super::{Exit, RunArgs, forecast};
use crate::config::{Config, Engine, Http, Problems, RawConfig, SensitiveAccess};
use crate::daemon::{self, DaemonCommand, DaemonOptions};
use crate::history::History;
use crate::http::WebConfig;
use crate::metrics::Build;
use crate::probe::driver::ProbeFault;
use crate::telemetry;

pub(super) fn run(args: &RunArgs) -> anyhow::Result<Exit> {
    let runtime = super::runtime()?;
    // Before the settings are read: by default, SIGHUP ends a process, and a reload may be sent as soon as it exists.
    let hangups = {
        let _context = runtime.enter();
        signal(SignalKind::hangup()).context("cannot listen for signals")?
    };
    let config = settings(args)?;
    let fault = ProbeFault::from_env()?;
    let web = WebConfig::load(&config.daemon.http).map_err(anyhow::Error::msg)?;
    let _log = telemetry::log_daemon().context("cannot start a thread for the log")?;
    let history = History::open(&config.daemon.history)?;
    if args.accept_lost_ledger {
        history.accept_lost_ledger();
    }
    let ending = runtime.block_on(async {
        let listener = listen(config.daemon.http.listen).await?;
        let address = listener.local_addr()?;
        log_start(address, &config.daemon.http, &web);
        let again = args.clone();
        let options = DaemonOptions {
            config,
            read_config: Arc::new(move || settings(&again)),
            listener,
            web,
            history,
            build: build(),
            fault,
            drill: false,
            observer: None,
        };
        daemon::run(options, commands_from_signals(hangups)?).await
    });
    // Does not wait for a DNS lookup that hangs: it runs on a blocking thread and cannot be cancelled. Everything else has
    // ended by now.
    runtime.shutdown_background();
    match ending {
        Ok(daemon::ShutdownKind::Drained) => Ok(Exit::Ok),
        Ok(daemon::ShutdownKind::Immediate) => Ok(Exit::CanaryFailed),
        Err(error) => {
            tracing::error!("{error:#}");
            Ok(Exit::CanaryFailed)
        }
    }
}

/// Reads the settings. A flag overrides the environment, and the environment overrides the file.
fn settings(args: &RunArgs) -> Result<Config, Problems> {
    let mut draft = RawConfig::read(args.config.as_deref(), super::environment())?;
    if let Some(address) = args.listen_address {
        let flag = "--web.listen-address";
        draft.set(&["http", "listen"], address.to_string(), flag);
    }
    if let Some(file) = &args.web_config_file {
        let file = file.display().to_string();
        draft.set(&["http", "web_config_file"], file, "--web.config.file");
    }
    if args.enable_lifecycle {
        let flag = "--web.enable-lifecycle";
        draft.set(&["http", "enable_lifecycle"], "true".to_owned(), flag);
    }
    if let Some(url) = &args.external_url {
        let flag = "--web.external-url";
        draft.set(&["http", "external_url"], url.clone(), flag);
    }
    let config = draft.validate()?;
    if config.targets.is_empty() {
        return Err(Problems::single(
            "no target is configured, so there is nothing to watch",
            "add [targets.NAME] with agent_name; config/canary.toml shows every key",
        ));
    }
    forecast::check_history_size(&config, Utc::now().date_naive())?;
    Ok(config)
}

/// Logs the version of the canary and where its page is.
fn log_start(address: SocketAddr, http: &Http, web: &WebConfig) {
    let Build {
        version, revision, ..
    } = build();
    let page = page_url(address, web.has_tls());
    let protection = web
        .summary()
        .unwrap_or_else(|| "plain HTTP, no users".to_owned());
    tracing::info!(
        version,
        revision,
        %address,
        page,
        "livekit-canary {version} ({revision}) is listening on {address}; page: {page} ({protection})"
    );
    let open = !address.ip().to_canonical().is_loopback() && !web.has_users();
    if open && http.enable_lifecycle {
        tracing::warn!(
            "everyone who reaches {address} can start batches and pause targets: enable_lifecycle is set, and there are no \
             users. Set basic_auth_users in http.web_config_file, or remove enable_lifecycle"
        );
    }
    if open && !web.has_client_certificates() && http.sensitive == SensitiveAccess::Everyone {
        tracing::warn!(
            "everyone who reaches {address} can read transcripts and recordings: http.sensitive is \"everyone\", and there are \
             no users. Set basic_auth_users in http.web_config_file, or remove http.sensitive"
        );
    }
}

/// The URL of the page on this machine.
fn page_url(address: SocketAddr, tls: bool) -> String {
    let ip = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    let scheme = if tls { "https" } else { "http" };
    format!("{scheme}://{}/", SocketAddr::new(ip, address.port()))
}

pub(super) async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| format!("cannot listen on {address}"))
}

/// Receives the commands that signals send: SIGHUP reloads, SIGTERM and Ctrl-C stop.
fn commands_from_signals(mut hangups: Signal) -> anyhow::Result<mpsc::Receiver<DaemonCommand>> {
    let (sender, commands) = mpsc::channel(4);
    let mut stops = StopSignals::new().context("cannot listen for signals")?;
    tokio::spawn(async move {
        loop {
            let command = tokio::select! {
                _ = hangups.recv() => DaemonCommand::Reload,
                () = stops.next() => DaemonCommand::Stop,
            };
            if sender.send(command).await.is_err() {
                return;
            }
        }
    });
    Ok(commands)
}

/// The version, revision, compiler and engines of this binary, for the series `build_info`.
pub(super) fn build() -> Build {
    Build {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        revision: env!("BUILD_REVISION").to_owned(),
        rustc: env!("BUILD_RUSTC").to_owned(),
        engine: Engine::BUILT_IN.map(Engine::name).join(","),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_of_an_unspecified_address_is_on_loopback() {
        for (address, tls, page) in [
            ("127.0.0.1:9787", false, "http://127.0.0.1:9787/"),
            ("0.0.0.0:9787", false, "http://127.0.0.1:9787/"),
            ("[::]:9787", true, "https://[::1]:9787/"),
            ("10.1.2.3:80", false, "http://10.1.2.3:80/"),
        ] {
            assert_eq!(page_url(address.parse().unwrap(), tls), page);
        }
    }
}
