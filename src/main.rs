//! The `fspfs` program: parse, run, exit code.

use std::io::Write as _;
use std::process::ExitCode;

use fspfs::cli::{Cli, complete, run, tell};
use fspfs::shown;

fn main() -> ExitCode {
    fspfs::sys::bound_allocator();
    fspfs::sys::raise_descriptor_limit();
    fspfs::sys::outlive_file_size_limit();
    complete();
    let cli = Cli::read(std::env::args_os());
    let is_json = cli.is_json();
    match run(cli) {
        Ok(exit) => exit.into(),
        // Whoever reads what we print has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let error = format!("{error:#}");
            if is_json {
                // If nobody reads it, nobody can be told.
                let error = serde_json::json!({ "error": error }).to_string();
                let _ = writeln!(std::io::stderr(), "{}", shown::json(&error));
            } else {
                tell(error);
            }
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
