//! The command line: messages, output, exit codes, help, completions and man pages.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use rstest::rstest;
use support::{BLOCK, MIB, Sandbox, can_mount, has, run, text};

/// A store with two snapshots, of 3 and 1 blocks.
fn two_snapshots() -> (Sandbox, String, String) {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", 5 * MIB, &[(0, 3 * BLOCK)]);
    sandbox.image("b.img", MIB - 7, &[(BLOCK, 9)]);
    let a = sandbox.upload("a.img", &["--name", "a", "--description", "first"]);
    let b = sandbox.upload("b.img", &["--name", "b"]);
    (sandbox, a, b)
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// A command without the store in its environment.
fn without_store(sandbox: &Sandbox, arguments: &[&str]) -> std::process::Output {
    run(sandbox.fspfs().env_remove("FSPFS_STORE").args(arguments))
}

fn code(output: &std::process::Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("{}", text(output)))
}

#[test]
fn init_makes_a_repository_where_nothing_is() {
    let sandbox = Sandbox::new();
    for store in ["new", "deep/er/new"] {
        let printed = sandbox.ok(&["init", store]);
        let path = sandbox.join(store);
        assert_eq!(printed, format!("file://{} is an empty repository\n", path.display()));
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "only its owner may look in");
        assert_eq!(sandbox.ok(&["-s", store, "list", "--json"]).trim(), "[]");
    }
    std::fs::create_dir(sandbox.join("empty")).unwrap();
    let made = json(&sandbox.ok(&["init", "--json", "-s", "empty"]));
    assert!(made["store"].as_str().unwrap().ends_with("/empty") && made["id"].is_string());
}

#[test]
fn init_refuses_what_is_in_use() {
    let sandbox = Sandbox::with_store();
    let message = sandbox.fails(&["init", "store"]);
    assert!(message.contains("store is a repository already"), "{message}");
    std::fs::create_dir(sandbox.join("full")).unwrap();
    std::fs::write(sandbox.join("full/thesis.txt"), "").unwrap();
    let message = sandbox.fails(&["init", "full"]);
    assert!(message.contains("thesis.txt") && message.contains("not empty"), "{message}");
    assert_eq!(support::names(sandbox.join("full")), ["thesis.txt"]);
    std::fs::write(sandbox.join("file"), "").unwrap();
    for (store, says) in
        [("file", "cannot create"), ("file/x", "cannot create"), ("/proc/x", "cannot create")]
    {
        let message = sandbox.fails(&["init", store]);
        assert!(message.contains(says) && message.contains(store), "{message}");
    }
    assert!(sandbox.ok(&["list"]).starts_with("SNAPSHOT"));
}

#[test]
fn a_store_that_cannot_be_used_is_named_with_the_cure() {
    let sandbox = Sandbox::with_store();
    std::fs::create_dir(sandbox.join("plain")).unwrap();
    std::fs::write(sandbox.join("file"), "").unwrap();
    for (store, says) in [
        ("missing", "does not exist"),
        ("plain", "is not a repository"),
        ("file", "is not a directory"),
    ] {
        for command in [&["list"][..], &["verify"], &["gc"], &["upload", "file"], &["mount", "mnt"]]
        {
            let output = run(sandbox.fspfs().args(["-s", store]).args(command));
            let message = String::from_utf8(output.stderr.clone()).unwrap();
            assert_eq!(code(&output), 1, "{message}");
            assert!(output.stdout.is_empty());
            assert!(message.contains(store) && message.contains(says), "{message}");
            assert!(message.contains("fspfs init"), "{message}");
        }
    }
    for store in ["gs://bucket/x", "http://x/", "file:relative", ""] {
        let output = run(sandbox.fspfs().args(["-s", store, "list"]));
        assert_eq!(code(&output), 2, "{}", text(&output));
        assert!(text(&output).contains("/srv/snaps"), "{}", text(&output));
    }
}

#[rstest]
#[case::newer(r#"{"format":2,"layout":"other"}"#, &["format 2", "newer version of fspfs"])]
#[case::requirement(
    r#"{"format":1,"requires":["zebra"],"block_size":524288,"id":"00000000-0000-4000-8000-000000000000"}"#,
    &["zebra", "newer version of fspfs"],
)]
#[case::block_size(
    r#"{"format":1,"requires":[],"block_size":4096,"id":"00000000-0000-4000-8000-000000000000"}"#,
    &["damaged", "4096"],
)]
#[case::no_format(r#"{"requires":[]}"#, &["damaged"])]
#[case::no_json("hello", &["damaged"])]
fn a_store_of_another_kind_is_left_alone(#[case] info: &str, #[case] says: &[&str]) {
    let sandbox = Sandbox::with_store();
    std::fs::write(sandbox.join("store/fspfs.json"), info).unwrap();
    sandbox.image("a.img", MIB, &[(0, 1)]);
    for command in
        [&["list"][..], &["upload", "a.img"], &["gc"], &["delete", "--yes", "snap-0"], &["verify"]]
    {
        let message = sandbox.fails(command);
        assert!(says.iter().all(|says| message.contains(says)), "{message}");
        assert!(message.contains("store"), "{message}");
    }
    assert_eq!(support::names(sandbox.join("store")), ["fspfs.json", "tmp"].as_slice());
}

#[test]
fn the_store_is_given_before_or_after_or_in_the_environment() {
    let (sandbox, a, _) = two_snapshots();
    let path = sandbox.join("store");
    let (path, url) = (path.to_str().unwrap(), format!("file://{}", path.display()));
    for line in [
        &["-s", "store", "list"][..],
        &["list", "-s", "./store"],
        &["--store", path, "list"],
        &["list", "--from", &url],
        &["--from=store", "list"],
        &["list", "-sstore"],
    ] {
        let output = without_store(&sandbox, line);
        assert!(output.status.success() && text(&output).contains(&a), "{}", text(&output));
    }
    // What is on the line counts more than what is around.
    let other = run(sandbox.fspfs().env("FSPFS_STORE", "/nowhere").args(["-s", "store", "list"]));
    assert!(other.status.success());
    for command in
        [&["list"][..], &["verify"], &["init"], &["mount", "mnt"], &["delete", "--yes", "snap-0"]]
    {
        // Without a store it is that of AWS, for which nothing is configured here.
        let mut fspfs = sandbox.fspfs();
        fspfs.env_remove("FSPFS_STORE").env("HOME", &sandbox.path);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("AWS_") {
                fspfs.env_remove(name);
            }
        }
        let output = run(fspfs.env("AWS_EC2_METADATA_DISABLED", "true").args(command));
        assert_eq!(code(&output), 1, "{}", text(&output));
        let message = text(&output);
        let says = if command == ["init"] { "ebs: is no repository" } else { "fspfs doctor" };
        assert!(message.contains(says), "{message}");
    }
}

#[test]
fn list_is_a_table() {
    let (sandbox, a, b) = two_snapshots();
    let table = sandbox.ok(&["list"]);
    let lines: Vec<&str> = table.lines().collect();
    let words: Vec<Vec<&str>> = lines.iter().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["SNAPSHOT", "STATE", "SIZE", "DATA", "STARTED", "NAME", "DESCRIPTION"]);
    assert_eq!(words[1][..6], [&a, "completed", "1", "GiB", "1.5", "MiB"]);
    assert_eq!(words[2][..6], [&b, "completed", "1", "GiB", "512.0", "KiB"]);
    assert_eq!(words[1][8..], ["a", "first"]);
    // The columns are straight.
    for column in ["STATE", "SIZE", "DATA", "STARTED", "NAME", "DESCRIPTION"] {
        let at = lines[0].find(column).unwrap();
        assert!(lines[1..].iter().all(|line| line.as_bytes()[at - 1] == b' '), "{table}");
    }
}

#[test]
fn text_of_others_is_shown_and_controls_no_terminal() {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", MIB, &[(0, 1)]);
    let (name, description) = ("x\x1b[2J\ny\u{202e}z", "a\r\nb\x07\u{9b}2J");
    let id = sandbox.upload("a.img", &["--name", name, "--description", description]);
    let is_hostile = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
    let table = sandbox.ok(&["list"]);
    assert_eq!(table.lines().count(), 2, "{table}");
    assert!(!table.contains(is_hostile), "{table:?}");
    let listed = sandbox.ok(&["list", "--json"]);
    assert!(!listed.contains(is_hostile), "{listed:?}");
    let listed = &json(&listed)[0];
    assert_eq!(
        (&listed["tags"]["Name"], &listed["description"]),
        (&name.into(), &description.into())
    );
    // Messages too, with names of files in them.
    let target = "no\x1b]0;owned\x07/such\u{202e}";
    let said = sandbox.fails(&["download", &id, target]);
    assert!(said.contains("owned") && !said.contains(is_hostile), "{said:?}");
}

#[test]
fn list_of_one_prints_the_line_of_the_original() {
    let (sandbox, a, b) = two_snapshots();
    for (id, chunks) in [(&a, 3), (&b, 1)] {
        let printed = sandbox.ok(&["list", id]);
        let bytes = chunks * BLOCK;
        let start = format!("Snapshot {id} contains {chunks} chunks and {bytes} bytes, took ");
        let seconds =
            printed.strip_prefix(&start).and_then(|rest| rest.strip_suffix(" seconds.\n"));
        let seconds = seconds.unwrap_or_else(|| panic!("{printed}"));
        assert!(seconds.parse::<f64>().is_ok() && seconds.contains('.'), "{printed}");
        let size = json(&sandbox.ok(&["list", id, "--json"]));
        assert_eq!(size["id"], id.as_str());
        assert_eq!((&size["blocks"], &size["bytes"]), (&chunks.into(), &bytes.into()));
    }
    let message = sandbox.fails(&["list", "snap-0123"]);
    assert!(message.contains("there is no snapshot snap-0123"), "{message}");
}

#[test]
fn upload_and_download_print_the_lines_of_the_original() {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", 5 * MIB + 1, &[(0, 3 * BLOCK)]);
    let printed = sandbox.ok(&["upload", "a.img"]);
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), 4, "{printed}");
    assert_eq!(lines[0], format!("Size of a.img is {} bytes and 11 chunks", 5 * MIB + 1));
    let numbers = |line: &str, before: &str, between: &str, after: &str| {
        let rest = line.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
        let (one, two) = rest.and_then(|rest| rest.split_once(between)).unwrap();
        assert!(one.parse::<f64>().is_ok() && two.parse::<f64>().is_ok(), "{line}");
    };
    numbers(lines[1], "a.img took ", " seconds at ", " bytes/sec.");
    assert_eq!(lines[2], "Total chunks uploaded 3");
    let id = lines[3];
    assert!(id.starts_with("snap-0") && id.len() == 22, "{id}");
    let printed = sandbox.ok(&["download", id, "b.img"]);
    let lines: Vec<&str> = printed.lines().collect();
    let start = format!("Snapshot {id} contains 3 chunks and {} bytes, took ", 3 * BLOCK);
    assert!(lines[0].starts_with(&start) && lines[0].ends_with(" seconds."), "{printed}");
    numbers(lines[1], "download took ", " seconds at ", " bytes/sec.");
    assert_eq!(lines[2..], [id]);
}

#[test]
fn quiet_leaves_the_result_alone() {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", MIB, &[(0, 1)]);
    let quiet = |arguments: &[&str]| {
        let output = run(sandbox.fspfs().args(arguments));
        assert!(output.status.success(), "{}", text(&output));
        assert!(output.stderr.is_empty(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let id = quiet(&["upload", "-q", "a.img"]);
    assert_eq!(id.lines().count(), 1);
    let id = id.trim_end();
    assert!(id.starts_with("snap-0"));
    assert_eq!(quiet(&["-q", "download", id, "b.img"]).trim_end(), id);
    assert!(quiet(&["list", "--quiet"]).contains(id));
    assert_eq!(quiet(&["delete", "--yes", "-q", id]).trim_end(), id);
    let output = run(sandbox.fspfs().args(["-q", "delete", "--yes", id]));
    assert!(code(&output) == 1 && text(&output).contains(id), "errors are told all the same");
    let both = run(sandbox.fspfs().args(["list", "-q", "-v"]));
    assert_eq!(code(&both), 2);
}

#[test]
fn json_is_one_value_and_nothing_else() {
    let (sandbox, a, b) = two_snapshots();
    let made = json(&sandbox.ok(&["--json", "upload", "--tag", "k=v=w", "--name", "c", "a.img"]));
    let c = made["id"].as_str().unwrap();
    assert_eq!((&made["state"], &made["data_blocks"]), (&"completed".into(), &3.into()));
    assert_eq!((&made["tags"]["k"], &made["tags"]["Name"]), (&"v=w".into(), &"c".into()));
    let list = json(&sandbox.ok(&["list", "--json"]));
    let ids: Vec<&str> =
        list.as_array().unwrap().iter().map(|s| s["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [&a, &b, c], "from old to new");
    assert_eq!(json(&sandbox.ok(&["download", "--json", &a, "out.img"]))["id"], a.as_str());
    let verified = json(&sandbox.ok(&["verify", "--json"]));
    assert_eq!((&verified["snapshots"], &verified["damage"]), (&3.into(), &serde_json::json!([])));
    let collected = json(&sandbox.ok(&["gc", "--json"]));
    assert_eq!(collected["deleted_objects"], 0);
    let deleted = json(&sandbox.ok(&["delete", "--yes", "--json", &a, &b]));
    assert_eq!(deleted, serde_json::json!({ "deleted": [a, b], "failed": [] }));
}

#[test]
fn exit_codes_tell_what_came_of_it() {
    let (sandbox, a, b) = two_snapshots();
    let exits = |arguments: &[&str], expected: i32| {
        let output = run(sandbox.fspfs().args(arguments));
        assert_eq!(code(&output), expected, "{arguments:?}: {}", text(&output));
        output
    };
    exits(&["list"], 0);
    exits(&["--help"], 0);
    exits(&["--version"], 0);
    exits(&["upload", "missing.img"], 1);
    exits(&["download", "snap-0", "x"], 1);
    exits(&["verify", "snap-0"], 1);
    for usage in [
        &[][..],
        &["frobnicate"],
        &["list", "--frobnicate"],
        &["list", "snap-not-hexadecimal"],
        &["upload"],
        &["download", &a],
        &["delete"],
        &["upload", "a.img", "--tag", "novalue"],
        &["gc", "--grace", "1s"],
        &["mount", "--memory", "1KiB", "mnt"],
        &["mount", "--file-mode", "9", "mnt"],
        &["mount", "--allow-other", "--allow-root", "mnt"],
        &["completions", "cobol"],
    ] {
        let output = exits(usage, 2);
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
    let missing = "snap-00000000000000000";
    let output = exits(&["delete", "--yes", &a, missing, &b], 3);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{a}\n{b}\n"));
    assert!(String::from_utf8(output.stderr).unwrap().contains(missing));
    assert_eq!(sandbox.ok(&["list"]).lines().count(), 1, "the others were deleted");
    exits(&["delete", "--yes", missing], 1);
}

#[test]
fn limits_of_tags_and_texts_are_told() {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", MIB, &[(0, 1)]);
    let long = |n: usize| "x".repeat(n);
    let tag = |key: usize, value: usize| format!("{}={}", long(key), long(value));
    for (arguments, says) in [
        (vec!["--tag".to_owned(), tag(128, 1)], "127"),
        (vec!["--tag".to_owned(), tag(1, 256)], "255"),
        (vec!["--name".to_owned(), long(256)], "255"),
        (vec!["--description".to_owned(), long(256)], "255"),
        ((0..51).map(|n| format!("--tag=k{n}=v")).collect(), "50"),
    ] {
        let output = run(sandbox.fspfs().args(["upload", "a.img"]).args(&arguments));
        assert_eq!(code(&output), 1);
        assert!(text(&output).contains(says), "{}", text(&output));
        assert!(text(&output).contains("a.img"), "{}", text(&output));
    }
    assert_eq!(sandbox.ok(&["list", "--json"]).trim(), "[]", "nothing half-made stays");
    let odd = ["a/b=../..", "new\nline=x\ny", "..=.", "ключ=значение", &tag(127, 255)];
    let mut upload = sandbox.fspfs();
    upload.args(["upload", "--json", "a.img"]);
    for tag in odd {
        upload.args(["--tag", tag]);
    }
    let made = json(&String::from_utf8(run(&mut upload).stdout).unwrap());
    for tag in odd {
        let (key, value) = tag.split_once('=').unwrap();
        assert_eq!(made["tags"][key], value);
    }
}

#[rstest]
#[case("bash", "complete ")]
#[case("zsh", "#compdef fspfs")]
#[case("fish", "--command fspfs")]
#[case("elvish", "edit:completion")]
#[case("powershell", "Register-ArgumentCompleter")]
fn each_shell_has_completions(#[case] shell: &str, #[case] says: &str) {
    let sandbox = Sandbox::new();
    let output = without_store(&sandbox, &["completions", shell]);
    let script = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && script.contains(says), "{script}");
}

#[test]
fn wrong_usage_is_told_as_json_too() {
    let sandbox = Sandbox::new();
    for arguments in [&["--json", "upload"][..], &["frobnicate", "--json"]] {
        let output = run(sandbox.fspfs().args(arguments));
        assert_eq!(code(&output), 2);
        let error = json(&String::from_utf8(output.stderr).unwrap());
        assert!(error["error"].is_string(), "{error}");
    }
}

#[test]
fn a_dry_run_of_what_has_none_is_refused() {
    let sandbox = Sandbox::new();
    for arguments in [&["-d", "init", "store"][..], &["-d", "umount", "mnt"]] {
        let output = run(sandbox.fspfs().args(arguments));
        assert_eq!(code(&output), 2, "{}", text(&output));
        assert!(text(&output).contains("has no dry run"), "{}", text(&output));
    }
    assert!(!sandbox.join("store").exists());
}

#[test]
fn a_name_that_means_something_to_a_shell_is_not_completed() {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", BLOCK, &[]);
    for name in ["web$(touch found)", "web;id", "web x", "web-1"] {
        sandbox.upload("a.img", &["--name", name]);
    }
    let mut ask = sandbox.fspfs();
    ask.env("COMPLETE", "bash").env("_CLAP_COMPLETE_INDEX", "4").env("_CLAP_IFS", "\n");
    let words = ["--", "fspfs", "-s", "./store", "list", "we"];
    let output = run(ask.args(words).env("_CLAP_COMPLETE_COMP_TYPE", "9"));
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim(), "web-1");
}

#[test]
fn a_shell_completes_commands_options_ids_and_names() {
    let (sandbox, a, _) = two_snapshots();
    std::fs::write(sandbox.join("script"), sandbox.ok(&["completions", "bash"])).unwrap();
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_fspfs")).parent().unwrap().display();
    let completed = |words: &str| {
        let count = words.split(' ').count() - 1;
        let output = sandbox.sh(&format!(
            "export PATH={program}:$PATH; source ./script; COMP_WORDS=({words}); COMP_CWORD={count}; \
             COMP_TYPE=9; $(complete -p fspfs | sed 's/.*-F \\([^ ]*\\).*/\\1/') fspfs \"${{COMP_WORDS[COMP_CWORD]}}\" ''; \
             printf '%s\\n' \"${{COMPREPLY[@]}}\""
        ));
        output.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(completed("fspfs upl"), ["upload"]);
    assert!(completed("fspfs upload --par").contains(&"--parent".to_owned()));
    assert!(completed("fspfs -s ./store download snap-").contains(&a));
    for word in ["fspfs -s ./store download ''", "fspfs -s ./store diff ''"] {
        let words = completed(word);
        assert!(words.contains(&"a".to_owned()) && words.contains(&"b".to_owned()), "{words:?}");
    }
    // A store that is not there is no reason to say anything.
    assert!(!completed("fspfs -s ./none download ''").contains(&a));
}

/// The commands that `--help` shows.
fn commands(sandbox: &Sandbox) -> Vec<String> {
    let help = sandbox.ok(&["--help"]);
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names =
        lines.take_while(|line| !line.is_empty()).filter_map(|line| line.strip_prefix("  "));
    names
        .filter(|line| !line.starts_with(' '))
        .map(|l| l.split(' ').next().unwrap().to_owned())
        .collect()
}

#[test]
fn man_pages_render_without_complaint() {
    let sandbox = Sandbox::new();
    let commands = commands(&sandbox);
    assert!(commands.len() >= 11, "{commands:?}");
    let lint = has(&["mandoc"]);
    for command in std::iter::once(None).chain(commands.iter().map(Some)) {
        let output = without_store(
            &sandbox,
            &["man"].into_iter().chain(command.map(String::as_str)).collect::<Vec<_>>(),
        );
        assert!(output.status.success(), "{}", text(&output));
        let name = command.map_or("fspfs".to_owned(), |command| format!("fspfs-{command}"));
        assert!(
            String::from_utf8_lossy(&output.stdout).contains(&format!(".TH {name} 1")),
            "{name}"
        );
        if lint {
            std::fs::write(sandbox.join("page.1"), &output.stdout).unwrap();
            let shown = sandbox.sh("mandoc -W error -T utf8 page.1 | col -b");
            for heading in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS"] {
                assert!(shown.contains(heading), "{heading} is missing for {name}: {shown}");
            }
        }
    }
    let message = sandbox.fails(&["man", "frobnicate"]);
    assert!(message.contains("frobnicate"), "{message}");
}

#[test]
fn help_has_headings_and_examples() {
    let sandbox = Sandbox::new();
    let help = sandbox.ok(&["--help"]);
    for says in
        ["Usage:", "Commands:", "Global options:", "Examples:", "FSPFS_STORE", "Exit status:"]
    {
        assert!(help.contains(says), "{says} is missing: {help}");
    }
    for command in commands(&sandbox) {
        let help = sandbox.ok(&[&command, "--help"]);
        assert!(help.contains("Global options:") && help.contains("--json"), "{help}");
        assert!(help.contains(&format!("Usage: fspfs {command}")), "{help}");
    }
    for command in ["init", "mount", "upload", "download"] {
        let help = sandbox.ok(&[command, "--help"]);
        assert!(help.contains("Example"), "{help}");
    }
    let help = sandbox.ok(&["mount", "--help"]);
    assert!(help.contains("Who may read:") && help.contains("How to run:"), "{help}");
}

#[test]
fn every_example_in_the_help_is_understood() {
    let sandbox = Sandbox::new();
    let mut seen = 0;
    for command in std::iter::once(None).chain(commands(&sandbox).into_iter().map(Some)) {
        let help =
            sandbox.ok(&command.iter().map(String::as_str).chain(["--help"]).collect::<Vec<_>>());
        let examples = help.lines().filter_map(|line| line.strip_prefix("  fspfs "));
        for example in examples {
            let words = shlex::split(example.split("   ").next().unwrap()).unwrap();
            // With --help behind it nothing is done, but all of it is read.
            let output = run(sandbox.fspfs().args(&words).arg("--frobnicate"));
            assert_eq!(code(&output), 2, "{example}");
            assert!(text(&output).contains("unexpected argument '--frobnicate'"), "{example}");
            seen += 1;
        }
    }
    assert!(seen >= 8, "only {seen} examples");
}

/// Nobody reads any more before anything is written.
const GONE: &str = "| (exec <&-; sleep 0.3)";

#[rstest]
#[case::list("list", GONE)]
#[case::list_one("list snap-0", GONE)]
#[case::help("--help", GONE)]
#[case::completions("completions bash", "| head -1")]
#[case::man("man", "| head -1")]
#[case::upload("upload a.img", GONE)]
#[case::verify("verify", "| head -1")]
#[case::error("list snap-0 2>&1", GONE)]
#[case::error_and_result("delete --yes snap-0 snap-1 2>&1", GONE)]
#[case::json("list --json", "| head -1")]
#[case::full("list", "> /dev/full")]
fn a_reader_that_goes_away_is_no_panic(#[case] line: &str, #[case] reader: &str) {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", MIB, &[(0, 1)]);
    for n in 0..3 {
        sandbox.upload("a.img", &["--name", &n.to_string()]);
    }
    let fspfs = env!("CARGO_BIN_EXE_fspfs");
    let script = format!("exec 3>code; {{ sleep 0.1; {fspfs} {line}; echo $? >&3; }} {reader}");
    let mut bash = Command::new("bash");
    bash.args(["-c", &script]);
    bash.current_dir(&sandbox.path).env("FSPFS_STORE", sandbox.join("store"));
    let output = run(&mut bash);
    let printed = text(&output);
    let code = std::fs::read_to_string(sandbox.join("code")).unwrap();
    assert!(!printed.contains("panicked"), "{printed}");
    assert!(["0\n", "1\n"].contains(&code.as_str()), "{code} {printed}");
    if reader == "> /dev/full" {
        assert!(code == "1\n" && printed.contains("No space left"), "{code} {printed}");
    }
}

#[test]
fn ids_go_to_stderr_where_stdout_fails() {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", MIB, &[(0, 1)]);
    for (option, reader) in [("", "> /dev/full"), ("--json", "> /dev/full"), ("-q", GONE)] {
        let line = format!("{} upload {option} a.img", env!("CARGO_BIN_EXE_fspfs"));
        let mut bash = Command::new("bash");
        bash.args(["-c", &format!("{{ sleep 0.1; {line}; }} {reader}")]);
        let bash = bash.current_dir(&sandbox.path).env("FSPFS_STORE", sandbox.join("store"));
        let output = run(bash.env("XDG_STATE_HOME", sandbox.join("state")));
        let made = sandbox.ok(&["list", "-q"]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(&format!("fspfs: {}", made.trim_end())), "{made}: {said}");
        sandbox.ok(&["delete", "--yes", made.trim_end()]);
    }
}

#[test]
fn gc_now_frees_at_once_and_is_refused_beside_a_mount() {
    if !can_mount(&[]) {
        return;
    }
    let sandbox = Sandbox::new();
    sandbox.ok(&["init", "store"]);
    let at = |arguments: &[&str]| run(sandbox.fspfs().args(arguments));
    sandbox.random("a.img", 3 * MIB);
    let upload = || {
        let output = at(&["-q", "upload", "a.img"]);
        assert!(output.status.success(), "{}", text(&output));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    };
    let packs = || sandbox.sh("find store/packs -type f | wc -l").trim_end().to_owned();
    let first = upload();
    sandbox.random("a.img", 3 * MIB);
    let second = upload();
    assert!(at(&["delete", "--yes", &first]).status.success());
    let mount = sandbox.mount(&[]);
    let refused = at(&["gc", "--now"]);
    let said = text(&refused);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("process {}", mount.daemon.id())), "{said}");
    mount.unmount();
    assert_eq!(packs(), "2");
    let dry = at(&["gc", "--now", "--dry-run"]);
    assert!(text(&dry).contains("would be deleted"), "{}", text(&dry));
    assert_eq!(packs(), "2");
    assert!(at(&["gc", "--now"]).status.success());
    assert_eq!(packs(), "1");
    assert!(at(&["verify", &second]).status.success());
}

#[test]
fn gc_says_what_it_would_do() {
    let (sandbox, a, _) = two_snapshots();
    sandbox.ok(&["delete", "--yes", &a]);
    let said = sandbox.ok(&["gc", "--dry-run"]);
    assert!(
        said.contains("0 objects would be deleted") && said.contains("3 objects wait"),
        "{said}"
    );
    assert!(!sandbox.join("store/gc").exists(), "a dry run leaves no record");
    let said = sandbox.ok(&["gc"]);
    assert!(said.contains("0 objects deleted") && said.contains("3 objects wait"), "{said}");
    assert_eq!(support::names(sandbox.join("store/gc")).len(), 1);
}
