//! `serve`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::output::print;
use super::run::{log_level, store_options, store_url};
use super::{Global, ServeArgs};
use crate::mount::{log_to_stderr_aside, state_directory};
use crate::ops::Exit;
use crate::serve::{self, Access, Keys, Options};
use crate::store::{StoreUrl, Stores};

/// Threads that may wait for a disk at the same time.
const WAITING_THREADS: usize = 48;

pub(super) fn serve(global: &Global, args: &ServeArgs) -> anyhow::Result<Exit> {
    if args.print_env {
        return print_env(args);
    }
    let url = store_url(global).absolute()?;
    let access = access(&url, args)?;
    let level = match (global.screen.quiet, global.screen.verbose) {
        (true, _) => tracing::Level::WARN,
        (false, 0) => tracing::Level::INFO,
        (false, _) => log_level(global),
    };
    let _log = log_to_stderr_aside(level)?;
    if let Access::Keys(keys) = &access {
        tracing::info!("requests are signed with the key {} of {}", keys.first().id, keys.origin());
    }
    if !serve::is_local(args.listen) {
        tracing::warn!(
            "{} is not of this machine alone, and nothing is encrypted on the way: put a TLS proxy before it",
            args.listen
        );
    }
    let runtime = crate::threads::runtime(Some(WAITING_THREADS), 0)?;
    runtime.block_on(async {
        let store = Stores::default().open(&url, &store_options(global, None)).await?;
        let listener = TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("cannot listen on {}", args.listen))?;
        let address = listener.local_addr()?;
        let options = Options {
            access,
            pending: Duration::from_secs(args.pending.into()),
            faults: args.inject.clone(),
            memory: args.memory.0,
            account: args.account.clone(),
            region: args.region.clone(),
            name: url.to_string(),
        };
        let stop = stop()?;
        // Whoever waits for this line may have gone away.
        let _ = print(format_args!("{url} is served at http://{address}"));
        serve::serve(listener, store, options, stop).await;
        anyhow::Ok(())
    })?;
    // Threads that wait for a store that does not answer must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    Ok(Exit::Done)
}

fn access(url: &StoreUrl, args: &ServeArgs) -> anyhow::Result<Access> {
    if args.no_auth {
        anyhow::ensure!(
            !matches!(url, StoreUrl::Ebs(_) | StoreUrl::Bucket(_)),
            "--no-auth is not for {url}: every program here would act with your rights at AWS"
        );
        anyhow::ensure!(
            serve::is_local(args.listen),
            "--no-auth is for this machine alone: {} can be reached from others. Listen on 127.0.0.1, or use keys",
            args.listen
        );
        // Its tokens end with the server where no file can be had.
        let keys = Keys::find(None, false, &own_keys()).unwrap_or_else(|_| Keys::for_once());
        return Ok(Access::Everybody(keys));
    }
    Ok(Access::Keys(keys(args)?))
}

fn keys(args: &ServeArgs) -> anyhow::Result<Keys> {
    Ok(Keys::find(args.credentials.as_deref(), true, &own_keys())?)
}

/// The file with the pair of this user.
fn own_keys() -> PathBuf {
    state_directory().join("serve").join("credentials")
}

/// The first SIGINT or SIGTERM ends it in order, a second one at once.
fn stop() -> std::io::Result<impl Future<Output = ()> + Send> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tracing::info!("finishing what is in flight");
        tokio::spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            std::process::exit(1);
        });
    })
}

/// What a shell evaluates so that clients find this server.
fn print_env(args: &ServeArgs) -> anyhow::Result<Exit> {
    let url = format!("http://{}", reachable(args.listen));
    let mut lines = Vec::new();
    let mut export = |name: &str, value: &str| {
        let value = shlex::try_quote(value).context("a value holds a NUL")?;
        lines.push(format!("export {name}={value}"));
        anyhow::Ok(())
    };
    let (id, secret, session) = if args.no_auth {
        // Clients insist on some key.
        ("none".to_owned(), "none".to_owned(), None)
    } else {
        let pair = keys(args)?.first().clone();
        (pair.id, pair.secret, pair.session)
    };
    export("AWS_ACCESS_KEY_ID", &id)?;
    export("AWS_SECRET_ACCESS_KEY", &secret)?;
    if let Some(session) = &session {
        export("AWS_SESSION_TOKEN", session)?;
    }
    for name in ["AWS_REGION", "AWS_DEFAULT_REGION"] {
        export(name, &args.region)?;
    }
    for name in ["AWS_ENDPOINT_URL_EBS", "AWS_ENDPOINT_URL_EC2", "AWS_ENDPOINT_URL_STS"] {
        export(name, &url)?;
    }
    // They would win over the keys above.
    lines.push(
        "unset AWS_PROFILE AWS_DEFAULT_PROFILE AWS_IGNORE_CONFIGURED_ENDPOINT_URLS".to_owned(),
    );
    if session.is_none() {
        lines.push("unset AWS_SESSION_TOKEN".to_owned());
    }
    print(lines.join("\n"))?;
    Ok(Exit::Done)
}

/// The address for a client on this machine.
fn reachable(address: SocketAddr) -> SocketAddr {
    if !address.ip().is_unspecified() {
        return address;
    }
    let ip = if address.is_ipv4() {
        [127, 0, 0, 1].into()
    } else {
        std::net::Ipv6Addr::LOCALHOST.into()
    };
    SocketAddr::new(ip, address.port())
}
