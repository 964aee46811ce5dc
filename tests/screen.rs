//! What commands show on a terminal and elsewhere: bars, lines, and what `-v` adds.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::{Command, Output, Stdio};

use support::{MIB, Mount, Sandbox, can_mount, has, run, text, until};

const COLUMNS: usize = 60;

/// A terminal of 60 columns, and every bar that was on it.
#[derive(Default)]
struct Terminal {
    lines: Vec<Vec<char>>,
    row: usize,
    column: usize,
    bars: Vec<String>,
}

impl Terminal {
    /// What is on it after all of this was written.
    fn after(written: &str) -> Self {
        let mut terminal = Self::default();
        let mut chars = written.chars();
        while let Some(c) = chars.next() {
            match c {
                '\r' => terminal.column = 0,
                '\n' => terminal.row += 1,
                '\x1b' => terminal.control(&mut chars),
                c => terminal.put(c),
            }
        }
        terminal
    }

    fn control(&mut self, chars: &mut std::str::Chars<'_>) {
        assert_eq!(chars.next(), Some('['));
        let mut number = String::new();
        let last = chars.find(|c| {
            number.extend(c.is_ascii_digit().then_some(*c));
            c.is_ascii_alphabetic()
        });
        let n = number.parse().unwrap_or(1);
        match last.unwrap() {
            'A' => self.row -= n,
            'B' => self.row += n,
            'C' => self.column += n,
            'D' => self.column = self.column.saturating_sub(n),
            'K' => self.line().clear(),
            _ => {}
        }
    }

    fn line(&mut self) -> &mut Vec<char> {
        let rows = self.lines.len().max(self.row + 1);
        self.lines.resize(rows, Vec::new());
        &mut self.lines[self.row]
    }

    fn put(&mut self, c: char) {
        if self.column == COLUMNS {
            (self.row, self.column) = (self.row + 1, 0);
        }
        let column = self.column;
        let line = self.line();
        line.resize(line.len().max(column + 1), ' ');
        line[column] = c;
        self.column += 1;
        let text: String = self.lines[self.row].iter().collect();
        if text.ends_with("/s -") || (text.contains("/s ") && text.ends_with(['s', 'm', 'h', 'd']))
        {
            self.bars.push(text);
        }
    }

    fn text(&self) -> String {
        let lines = self.lines.iter().map(|line| line.iter().collect::<String>());
        lines.map(|line| line.trim_end().to_owned() + "\n").collect()
    }
}

/// Runs it on a terminal.
fn on_terminal(sandbox: &Sandbox, arguments: &[&str]) -> Terminal {
    let output = run(script(sandbox, arguments).stdin(Stdio::null()));
    let shown = Terminal::after(&String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", shown.text());
    shown
}

/// A program that runs it on a terminal, and types there what it reads.
fn script(sandbox: &Sandbox, arguments: &[&str]) -> Command {
    let fspfs = sandbox.fspfs();
    let words = std::iter::once(fspfs.get_program().to_str().unwrap());
    let words: Vec<_> = words.chain(arguments.iter().copied()).collect();
    let line = shlex::try_join(words).unwrap();
    let mut script = Command::new("script");
    script.args(["-qec", &format!("stty cols {COLUMNS} rows 20; {line}"), "/dev/null"]);
    script.current_dir(&sandbox.path).env("TERM", "xterm");
    for (name, value) in fspfs.get_envs() {
        match value {
            Some(value) => script.env(name, value),
            None => script.env_remove(name),
        };
    }
    script
}

/// What a program reads: a file with this in it.
fn typed(sandbox: &Sandbox, text: &str) -> Stdio {
    let path = sandbox.join("typed");
    std::fs::write(&path, text).unwrap();
    std::fs::File::open(path).unwrap().into()
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// A store with a snapshot of `a.img`: 40 blocks of data in 30 MiB of a volume of 1 GiB.
fn one() -> (Sandbox, String) {
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", 30 * MIB, &[(0, 12 * MIB), (20 * MIB, 8 * MIB)]);
    let id = sandbox.upload("a.img", &[]);
    (sandbox, id)
}

#[test]
fn a_bar_fits_60_columns_and_is_gone_at_the_end() {
    if !has(&["script", "stty"]) {
        return;
    }
    let (mut sandbox, id) = one();
    let shows = |sandbox: &Sandbox, arguments: &[&str], names: &[&str], total: &str| {
        let terminal = on_terminal(sandbox, arguments);
        let (bars, text) = (&terminal.bars, terminal.text());
        for name in names {
            let of_it = bars.iter().any(|bar| bar.starts_with(&format!("{name:11} ")));
            assert!(of_it, "{arguments:?} {name}: {bars:?}\n{text}");
        }
        for bar in bars {
            assert!(bar.chars().count() < COLUMNS, "{bar}");
            assert!(bar.contains(&format!("% of {total} ")), "{bar}");
        }
        assert!(!text.contains('%') && !text.contains("--"), "{text}");
        text
    };
    let text = shows(&sandbox, &["upload", "a.img"], &["Uploading"], "1.0 GiB");
    assert!(text.starts_with(&format!("Size of a.img is {} bytes", 30 * MIB)), "{text}");
    assert_eq!(text.matches("snap-").count(), 1, "{text}");
    let text = shows(&sandbox, &["download", &id, "b.img"], &["Downloading"], "1.0 GiB");
    assert!(text.trim_end().ends_with(&id), "{text}");
    let text = shows(&sandbox, &["verify"], &["Verifying"], "40.0 MiB");
    assert!(text.contains("Everything is intact"), "{text}");
    shows(&sandbox, &["verify", &id, "--against", "a.img"], &["Verifying"], "1.0 GiB");
    let names = ["one.img", "two.img", "…/three.img"];
    std::fs::create_dir(sandbox.join("a")).unwrap();
    let arguments = ["multiclone", &id, "one.img", "two.img", "a/a/../three.img"];
    std::fs::create_dir(sandbox.join("a/a")).unwrap();
    shows(&sandbox, &arguments, &names, "1.0 GiB");
    sandbox.ok(&["init", "other"]);
    shows(&sandbox, &["copy", &id, "--to", "other"], &["Copying"], "1.0 GiB");
    sandbox.serve(&[]);
    shows(&sandbox, &["verify", &id], &["Verifying"], "1.0 GiB");
    for silent in ["-q", "--json"] {
        let terminal = on_terminal(&sandbox, &["download", silent, &id, "b.img"]);
        assert!(terminal.bars.is_empty(), "{:?}", terminal.bars);
    }
}

#[test]
fn without_a_terminal_a_line_comes_every_ten_seconds() {
    let (mut sandbox, id) = one();
    let short = run(sandbox.fspfs().args(["download", &id, "b.img"]));
    assert_eq!(said(&short), "");
    sandbox.serve(&[]);
    let slow = ["download", "--max-requests-per-second", "3", &id, "c.img"];
    let output = run(sandbox.fspfs().args(slow));
    assert!(output.status.success(), "{}", text(&output));
    let said = said(&output);
    let lines: Vec<_> = said.lines().filter(|l| l.starts_with("fspfs: Downloading: ")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].contains("% of 1.0 GiB "), "{said}");
    let quiet = run(sandbox.fspfs().arg("-q").args(&slow[..]).arg("--restart"));
    assert_eq!(text(&quiet), format!("exit status: 0\n{id}\n"));
}

#[test]
fn verbose_tells_blocks_and_requests_that_are_sent_again() {
    let (mut sandbox, id) = one();
    let tells = |sandbox: &Sandbox, arguments: &[&str]| {
        let output = run(sandbox.fspfs().args(arguments));
        assert_eq!(String::from_utf8(output.stdout.clone()).unwrap().lines().last(), Some(&id[..]));
        said(&output)
    };
    let told = tells(&sandbox, &["-v", "download", &id, "b.img"]);
    assert_eq!(told.matches("fspfs: b.img: 40 blocks passed, 0 failed\n").count(), 1, "{told}");
    assert!(!told.contains("block 0"), "{told}");
    let told = tells(&sandbox, &["-vv", "multiclone", &id, "b.img", "c.img"]);
    for place in ["b.img", "c.img"] {
        assert!(told.contains(&format!("fspfs: {place}: block 40 passed\n")), "{told}");
        let blocks = told.matches(&format!("fspfs: {place}: block ")).count();
        assert_eq!(blocks, 40, "{told}");
        assert!(told.contains(&format!("fspfs: {place}: 40 blocks passed, 0 failed\n")), "{told}");
    }
    let uploaded = run(sandbox.fspfs().args(["upload", "-v", "a.img"]));
    let store = sandbox.join("store").display().to_string();
    let line = format!("file://{store}: 40 blocks passed, 0 failed\n");
    assert!(said(&uploaded).contains(&line), "{}", text(&uploaded));

    sandbox.serve(&["--inject", "throttle=30%,seed=7"]);
    let again = |told: &str| told.contains("attempt 1 failed");
    let told = tells(&sandbox, &["-vv", "download", "--restart", &id, "b.img"]);
    assert!(!again(&told), "{told}");
    let told = tells(&sandbox, &["-vvv", "download", "--restart", &id, "b.img"]);
    assert!(again(&told) && told.contains("b.img: block 40 passed"), "{told}");
}

#[test]
fn a_damaged_block_is_one_that_failed() {
    let (sandbox, id) = one();
    sandbox.sh("for p in $(find store/packs -type f); do printf x | dd of=$p bs=1 seek=9000 conv=notrunc; done");
    let output = run(sandbox.fspfs().args(["-vv", "verify"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("39 blocks passed, 1 failed"), "{}", text(&output));
    let failed = said(&output).lines().filter(|line| line.contains(" failed: ")).count();
    assert_eq!(failed, 1, "{}", text(&output));

    // Nothing but ids and errors.
    let output = run(sandbox.fspfs().args(["-q", "verify"]));
    assert_eq!(String::from_utf8(output.stdout.clone()).unwrap().trim_end(), id);
    assert!(said(&output).contains("packs/") && said(&output).contains("has lost 1 blocks"));
    let output = run(sandbox.fspfs().args(["-q", "gc"]));
    assert!(output.stdout.is_empty(), "{}", text(&output));
}

#[test]
fn a_commit_that_is_under_way_is_shown() {
    if !can_mount(&["script", "stty"]) {
        return;
    }
    let (mut sandbox, _) = one();
    sandbox.serve(&[]);
    let mount = sandbox.mount(&["--max-requests-per-second", "6"]);
    sandbox.sh("cp a.img mnt/new/.web; mv mnt/new/.web mnt/new/web.img");
    let mut image = serde_json::Value::Null;
    until("some blocks are put", || {
        let staged: serde_json::Value =
            serde_json::from_str(&sandbox.ok(&["staged", "--json", "mnt"])).unwrap();
        image = staged[0].clone();
        image["blocks_done"].as_u64().is_some_and(|done| done > 0)
    });
    assert_eq!(image["blocks_in_all"], 2048, "{image}");
    let listed = sandbox.ok(&["staged", "mnt"]);
    assert!(listed.contains("committing ") && listed.contains("% "), "{listed}");
    assert_eq!(sandbox.ok(&["staged", "-q", "mnt"]), "web.img\n");
    let terminal = on_terminal(&sandbox, &["umount", "mnt"]);
    let (bars, left) = (&terminal.bars, terminal.text());
    assert!(bars.iter().any(|bar| bar.starts_with("new/web.img ")), "{bars:?}\n{left}");
    assert!(
        left.contains("waiting for the commit of new/web.img") && !left.contains('%'),
        "{left}"
    );
    mount.ended();
}

#[test]
fn a_job_has_what_a_terminal_shows() {
    if !can_mount(&[]) {
        return;
    }
    let (sandbox, id) = one();
    let mount = sandbox.mount(&[]);
    let file = |name: &str| std::fs::read_to_string(mount.join(name)).unwrap();
    let out = sandbox.path.display();
    let ended = |mount: &Mount, job: u64| {
        let state = mount.join(format!("control/jobs/{job}/state"));
        until("it ends", || std::fs::read_to_string(&state).unwrap() == "done 0\n");
    };
    sandbox.sh(&format!("echo -vv {id} {out}/one.img {out}/two.img > mnt/control/multiclone"));
    ended(&mount, 1);
    assert_eq!(file("control/jobs/1/progress"), "4096/4096\n");
    let log = file("control/jobs/1/log");
    assert!(log.contains(&format!("{out}/two.img: block 40 passed\n")), "{log}");
    assert!(log.contains(&format!("{out}/one.img: 40 blocks passed, 0 failed\n")), "{log}");
    sandbox.sh("echo > mnt/control/verify");
    ended(&mount, 2);
    assert_eq!(
        (file("control/jobs/2/progress"), file("control/jobs/2/log")),
        ("40/40\n".to_owned(), String::new())
    );
    sandbox.sh("cp a.img mnt/new/web.img; printf x | dd of=mnt/new/web.img conv=notrunc bs=1");
    sandbox.ok(&["commit", "mnt/new/web.img"]);
    let jobs: serde_json::Value =
        serde_json::from_str(&sandbox.ok(&["jobs", "--json", "mnt"])).unwrap();
    let last = jobs.as_array().unwrap().last().unwrap();
    assert_eq!(last["blocks_done"], last["blocks_in_all"], "{last}");
    mount.unmount();
}

#[test]
fn a_deletion_says_what_goes_and_asks_at_a_terminal_alone() {
    if !has(&["script"]) {
        return;
    }
    let sandbox = Sandbox::with_store();
    sandbox.image("a.img", MIB, &[(0, 8)]);
    let ids = ["web\u{9b}1", "db"].map(|name| sandbox.upload("a.img", &["--name", name]));
    let left = || sandbox.ok(&["list", "-q"]).lines().count();
    // What is piped in answers nothing.
    for answer in ["n\n", "y\n", ""] {
        let mut delete = sandbox.fspfs();
        let output = run(delete.args(["delete", &ids[0]]).stdin(typed(&sandbox, answer)));
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(said(&output).contains("give --yes") && said(&output).contains(&ids[0]));
        assert_eq!(left(), 2);
    }
    let both = ["delete", &ids[0], &ids[1]];
    for (arguments, answer, code, remain) in [
        (&both[..], "n\n", 1, 2),
        (&both[..], "\n", 1, 2),
        (&both[..], "", 1, 2),
        (&both[..2], "y\n", 0, 1),
    ] {
        let output = run(script(&sandbox, arguments).stdin(typed(&sandbox, answer)));
        let shown = String::from_utf8_lossy(&output.stdout);
        assert_eq!((output.status.code(), left()), (Some(code), remain), "{shown}");
        let today = sandbox.described(&ids[1])["start_time"].as_str().unwrap()[..10].to_owned();
        let names = ["web\u{fffd}1", "db"].into_iter().zip(&ids);
        for (name, id) in names.take(arguments.len() - 1) {
            let line = shown.lines().find(|line| line.contains(&format!("{id}: ")));
            let line = line.unwrap_or_else(|| panic!("{shown}"));
            assert!(line.contains(&format!("{name}, 1 GiB, {today}")), "{line}");
        }
        let store = sandbox.join("store").display().to_string();
        let question = shown.lines().find(|line| line.contains("[y/N]")).unwrap();
        assert!(question.starts_with("Delete ") && question.contains(&store), "{question}");
    }
}
