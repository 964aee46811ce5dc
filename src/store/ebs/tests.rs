//! Answers that a service gives seldom or never, from a server that gives them word for word.

use std::sync::Mutex;
use std::time::Duration;

use aws_config::retry::RetryConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::SharedCredentialsProvider;
use rstest::rstest;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::tokens::Token;
use super::*;
use crate::model::{BLOCK_SIZE, Digest, VolumeSize};
use crate::store::ErrorKind;
use crate::store::aws::http;

/// What is sent for a request; then the connection ends.
#[derive(Clone, Debug)]
enum Answer {
    Text(String),
    Bytes(Vec<u8>),
    /// A head, and then zeros as long as somebody takes them.
    Endless(&'static str),
    Nothing,
}

/// How much a server has sent for each request.
type Sent = Arc<Mutex<Vec<u64>>>;

fn text(status: &str, body: &str) -> Answer {
    let len = body.len();
    Answer::Text(format!(
        "HTTP/1.1 {status}\r\nContent-Length: {len}\r\nConnection: close\r\n\r\n{body}"
    ))
}

/// Reads a request to its end.
async fn request(peer: &mut TcpStream) -> std::io::Result<()> {
    let (mut read, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let len = peer.read(&mut piece).await?;
        read.extend_from_slice(&piece[..len]);
        let text = String::from_utf8_lossy(&read).to_lowercase();
        if let Some((head, _)) = text.split_once("\r\n\r\n") {
            let length = head.split_once("content-length: ").map_or("0", |(_, rest)| rest);
            let length: usize = length.lines().next().unwrap_or("0").parse().unwrap_or(0);
            if len == 0 || read.len() >= head.len() + 4 + length {
                return Ok(());
            }
        }
    }
}

async fn send(peer: &mut TcpStream, answer: Answer, sent: &Mutex<Vec<u64>>) -> std::io::Result<()> {
    request(peer).await?;
    sent.lock().unwrap().push(0);
    let count = |len: usize| *sent.lock().unwrap().last_mut().unwrap() += len as u64;
    match answer {
        Answer::Text(text) => peer.write_all(text.as_bytes()).await?,
        Answer::Bytes(bytes) => peer.write_all(&bytes).await?,
        Answer::Nothing => {}
        Answer::Endless(head) => {
            peer.write_all(head.as_bytes()).await?;
            loop {
                peer.write_all(&vec![b' '; 65_536]).await?;
                count(65_536);
            }
        }
    }
    Ok(())
}

/// A store whose requests get one answer after the other, and the last one for ever.
async fn answering(answers: Vec<Answer>) -> (Ebs, Sent) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let sent = Sent::default();
    let counts = Arc::clone(&sent);
    tokio::spawn(async move {
        let mut next = answers.into_iter().peekable();
        loop {
            let (mut peer, _) = listener.accept().await.unwrap();
            let answer = next.next().unwrap();
            if next.peek().is_none() {
                next = vec![answer.clone()].into_iter().peekable();
            }
            // Whoever has enough goes away.
            let _ = send(&mut peer, answer, &counts).await;
        }
    });
    let shared = SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .endpoint_url(format!("http://{address}"))
        .credentials_provider(SharedCredentialsProvider::new(Credentials::for_tests()))
        .http_client(http::client(&http::Settings::default()))
        .retry_config(RetryConfig::disabled())
        .build();
    let clients = Clients::of(&shared, &"ebs:".parse().unwrap());
    (Ebs::of(Arc::new(Account::alone(clients)), &StoreOptions::default()), sent)
}

/// The store of a URL, with so many blocks under way at most; 0 is no limit.
async fn opened(accounts: &Accounts, url: &str, in_flight: usize) -> Ebs {
    let account = accounts.of(&url.parse().unwrap()).await.unwrap();
    let max_in_flight = NonZeroUsize::new(in_flight);
    Ebs::of(account, &StoreOptions { max_in_flight, ..StoreOptions::default() })
}

#[tokio::test]
async fn two_stores_of_an_account_spend_one_quota() {
    let accounts = Accounts::default();
    let url = "ebs://us-east-1?endpoint=http://127.0.0.1:9";
    let one = opened(&accounts, url, 0).await;
    // They lead to the same place.
    let other = opened(&accounts, &format!("{url}&ec2-endpoint=http://127.0.0.1:9"), 1).await;
    let same = |a: &Ebs, b: &Ebs| Arc::ptr_eq(&a.service.account, &b.service.account);
    assert!(same(&one, &other));
    assert_eq!((one.parallelism(), other.parallelism()), (1, 1));
    let elsewhere = opened(&accounts, "ebs://eu-west-2?endpoint=http://127.0.0.1:9", 0).await;
    let waits = async |store: &Ebs| {
        let permit = store.service.permit(&kinds::GET_SNAPSHOT_BLOCK);
        tokio::time::timeout(Duration::from_millis(20), permit).await.is_err()
    };
    let sent = other.service.permit(&kinds::GET_SNAPSHOT_BLOCK).await;
    assert!(waits(&one).await && !waits(&elsewhere).await);
    drop(sent);
    assert!(!waits(&one).await);
    drop(other);
    assert_eq!((one.parallelism(), elsewhere.parallelism()), (100, 100));
    // Whoever names a profile has its credentials, and of another account another quota.
    let profile = "ebs://no-such-profile@us-east-1?endpoint=http://127.0.0.1:9";
    let named = opened(&accounts, profile, 2).await;
    assert!(!same(&one, &named));
    assert_eq!((one.parallelism(), named.parallelism()), (100, 2));
}

#[tokio::test]
async fn a_snapshot_that_one_store_has_started_is_known_to_others_of_the_account() {
    let (store, _) = answering(vec![text(
        "201 Created",
        &format!(r#"{{"SnapshotId":"{}","Status":"pending"}}"#, id()),
    )])
    .await;
    let other = Ebs::of(Arc::clone(&store.service.account), &StoreOptions::default());
    store.start(StartRequest::new(VolumeSize::from_gib(1).unwrap())).await.unwrap();
    assert!(other.started().contains(&id()));
    // What was sent is told to the one who asked for it.
    let sent = |store: &Ebs| store.usage().unwrap().requests.iter().map(|(_, n)| n).sum::<u64>();
    assert_eq!((sent(&store), sent(&other)), (1, 0));
}

fn id() -> SnapshotId {
    "snap-0123456789abcdef0".parse().unwrap()
}

fn short_block() -> Answer {
    let data = [7; 1000];
    let head = format!(
        "HTTP/1.1 200 OK\r\nx-amz-Checksum: {}\r\nx-amz-Checksum-Algorithm: SHA256\r\n\
         x-amz-Data-Length: 1000\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n",
        Digest::of(&data).to_base64()
    );
    Answer::Bytes([head.as_bytes(), &data].concat())
}

async fn first_block(store: &Ebs) -> Result<Block> {
    let token = Token { text: "token".to_owned(), end: u64::MAX };
    store.get_block(&id(), BlockIndex::ZERO, &token.encode()).await
}

async fn first_page(store: &Ebs) -> Result<BlockPage> {
    store.list_blocks(&id(), ListFrom::Index(BlockIndex::ZERO), 100).await
}

const LOGIN: &str = "<html><body>Please log in</body></html>";

#[rstest]
#[case(text("200 OK", LOGIN), "the answer cannot be read")]
#[case(text("200 OK", ""), "no list of blocks")]
#[case(text("200 OK", "{}"), "no list of blocks")]
#[case(text("200 OK", r#"{"status":"ok"}"#), "no list of blocks")]
#[case(
    text(
        "200 OK",
        r#"{"Blocks":[{"BlockIndex":5,"BlockToken":"a"},{"BlockIndex":5,"BlockToken":"b"}],
    "VolumeSize":1}"#
    ),
    "block 5 behind block 5"
)]
#[case(Answer::Endless("HTTP/1.1 200 OK\r\n\r\n"), "length limit exceeded")]
#[tokio::test]
async fn asks_six_times_for_a_list_that_is_none(#[case] answer: Answer, #[case] says: &str) {
    let (store, sent) = answering(vec![answer]).await;
    let error = first_page(&store).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let told = error.to_string();
    assert!(told.contains(says) && told.contains("`fspfs doctor`"), "{told}");
    assert!(told.contains("after 6 attempts"), "{told}");
    let sent = sent.lock().unwrap();
    assert_eq!(sent.len(), 6);
    // The rest is in the buffers of sockets.
    assert!(sent.iter().all(|bytes| *bytes < 160 << 20), "{sent:?}");
}

#[tokio::test]
async fn a_list_need_not_say_how_large_the_volume_is() {
    let list = r#"{"Blocks":[{"BlockIndex":5,"BlockToken":"a"}]}"#;
    let (store, _) = answering(vec![text("200 OK", list)]).await;
    let page = first_page(&store).await.unwrap();
    assert_eq!((page.blocks[0].index, page.next.is_some()), (BlockIndex(5), false));
    let (store, _) = answering(vec![text("200 OK", r#"{"Blocks":[],"VolumeSize":-1}"#)]).await;
    assert!(first_page(&store).await.unwrap_err().to_string().contains("a volume of 0 GiB"));
}

#[tokio::test]
async fn asks_six_times_for_a_block_that_is_none() {
    let (store, sent) = answering(vec![short_block()]).await;
    let told = first_block(&store).await.unwrap_err().to_string();
    assert!(told.contains(&format!("1000 bytes, where a block has {BLOCK_SIZE}")), "{told}");
    assert!(told.contains("`fspfs doctor`"), "{told}");
    assert_eq!(sent.lock().unwrap().len(), 6);
}

#[tokio::test]
async fn asks_six_times_for_snapshots_that_are_none() {
    let (store, sent) = answering(vec![text("200 OK", LOGIN)]).await;
    let told = store.list(None).await.unwrap_err().to_string();
    assert!(told.contains("none of EC2, or was cut short; does something else answer"), "{told}");
    assert_eq!(sent.lock().unwrap().len(), 6);
}

#[rstest]
#[case(
    text(
        "403 Forbidden",
        "<?xml?><Error><Code>AccessDenied</Code><Message>Not you</Message></Error>"
    ),
    ErrorKind::Denied,
    "status 403, and no answer that the service would give: AccessDenied Not you"
)]
#[case(text("403 Forbidden", LOGIN), ErrorKind::Denied, "Please log in")]
#[case(
    Answer::Text("HTTP/1.1 307 Temporary Redirect\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n".to_owned()),
    ErrorKind::Unavailable,
    "(it leads to http://elsewhere/)"
)]
#[case(Answer::Endless("HTTP/1.1 400 Bad Request\r\n\r\n"), ErrorKind::Unavailable, "status 400")]
#[tokio::test]
async fn a_refusal_by_something_else_is_told(
    #[case] answer: Answer,
    #[case] kind: ErrorKind,
    #[case] says: &str,
) {
    let (store, sent) = answering(vec![answer]).await;
    let error = first_page(&store).await.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(says), "{error}");
    let sent = sent.lock().unwrap();
    let once = kind == ErrorKind::Denied;
    assert_eq!(sent.len(), if once { 1 } else { 6 });
    assert!(sent.iter().all(|bytes| *bytes < 32 << 20), "{sent:?}");
}

fn page(inner: &str) -> Answer {
    let name = "DescribeSnapshotsResponse";
    text("200 OK", &format!("<{name}>{inner}</{name}>"))
}

fn completed() -> String {
    format!(
        "<snapshotSet><item><snapshotId>{}</snapshotId><status>completed</status>\
         <volumeSize>3</volumeSize></item></snapshotSet>",
        id()
    )
}

#[tokio::test]
async fn a_snapshot_may_be_on_a_later_page() {
    let item = completed();
    let empty = "<snapshotSet/><nextToken>more</nextToken>";
    let (store, sent) = answering(vec![page(empty), page(&item)]).await;
    let found = store.describe(&id()).await.unwrap();
    assert_eq!(found.volume_size, VolumeSize::from_gib(3).unwrap());
    assert_eq!(sent.lock().unwrap().len(), 2);
    let (store, _) = answering(vec![page("<snapshotSet/>")]).await;
    assert_eq!(store.describe(&id()).await.unwrap_err().kind(), ErrorKind::NotFound);
    // One that never ends is given up.
    let (store, sent) = answering(vec![page(empty)]).await;
    assert_eq!(store.describe(&id()).await.unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(sent.lock().unwrap().len(), 600);
}

#[tokio::test]
async fn a_start_that_is_still_at_work_is_waited_for() {
    let busy = || text("409 Conflict", r#"{"__type":"ConflictException","Message":"at work"}"#);
    let started =
        text("201 Created", &format!(r#"{{"SnapshotId":"{}","Status":"pending"}}"#, id()));
    let request = || StartRequest::new(VolumeSize::from_gib(1).unwrap());
    let (store, sent) = answering(vec![Answer::Nothing, busy(), busy(), started]).await;
    assert_eq!(store.start(request()).await.unwrap().id, id());
    assert_eq!(sent.lock().unwrap().len(), 4);
    // Without an attempt before, there is another snapshot with these parameters.
    let (store, sent) = answering(vec![busy()]).await;
    let error = store.start(request()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(error.to_string().contains("`fspfs list` shows it as pending"), "{error}");
    assert_eq!(sent.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_completion_whose_answer_is_none_may_have_been_accepted() {
    let refused = r#"{"__type":"ValidationException","Reason":"INVALID_SNAPSHOT_ID"}"#;
    let answers =
        [text("202 Accepted", LOGIN), text("400 Bad Request", refused), page(&completed())];
    let (store, sent) = answering(answers.to_vec()).await;
    let request = CompleteRequest { changed_blocks: 1, checksum: None, started: None };
    let done = store.complete(&id(), request).await.unwrap();
    assert_eq!(done.state, SnapshotState::Completed);
    assert_eq!(sent.lock().unwrap().len(), 3);
}

/// Whatever was refused in the end: a program would delete it.
#[rstest]
#[case("403 Forbidden", "<html>Not from here</html>")]
#[case("404 Not Found", "<html>No such page</html>")]
#[case("403 Forbidden", r#"{"__type":"AccessDeniedException","Message":"not any more"}"#)]
#[tokio::test]
async fn a_completion_that_was_lost_and_then_refused_is_looked_for(
    #[case] status: &str,
    #[case] body: &str,
) {
    let strange = body.starts_with('<');
    let lost = if strange { None } else { Some(Answer::Nothing) };
    let refused = text(status, body);
    let tries = if strange && status.starts_with("404") { 6 } else { 1 };
    let answers = lost.into_iter().chain(vec![refused; tries]).chain([page(&completed())]);
    let (store, _) = answering(answers.collect()).await;
    let request = CompleteRequest { changed_blocks: 1, checksum: None, started: None };
    let done = store.complete(&id(), request).await.unwrap();
    assert_eq!(done.state, SnapshotState::Completed);
}

#[tokio::test]
async fn a_snapshot_that_is_not_known_yet_is_not_deleted_already() {
    let unknown = || {
        let inner = "<Errors><Error><Code>InvalidSnapshot.NotFound</Code><Message>none</Message></Error></Errors>";
        text("400 Bad Request", &format!("<Response>{inner}<RequestID>r</RequestID></Response>"))
    };
    let done = || {
        let name = "DeleteSnapshotResponse";
        text("200 OK", &format!("<{name}><return>true</return></{name}>"))
    };
    let (store, sent) = answering(vec![unknown(), unknown(), unknown(), done()]).await;
    let later = RetryPolicy::until_known(Instant::now() + Duration::from_mins(1));
    catalog::delete(&store.service, &id(), later).await.unwrap();
    assert_eq!(sent.lock().unwrap().len(), 4);
    // After an answer that was lost it is gone.
    let (store, sent) = answering(vec![Answer::Nothing, unknown()]).await;
    store.delete(&id()).await.unwrap();
    assert_eq!(sent.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_put_that_something_else_has_answered_is_none() {
    let (store, sent) = answering(vec![text("200 OK", LOGIN)]).await;
    let block = Block::new(vec![7; BLOCK_SIZE].into());
    let error = store.put_block(&id(), BlockIndex::ZERO, block).await.unwrap_err();
    assert!(error.to_string().contains("neither a checksum nor the id"), "{error}");
    assert_eq!(sent.lock().unwrap().len(), 6);
}

#[tokio::test]
async fn an_answer_that_is_cut_is_asked_for_again() {
    let cut =
        Answer::Text("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{\"Blocks\":[".to_owned());
    let whole = text("200 OK", r#"{"Blocks":[{"BlockIndex":5,"BlockToken":"a"}],"VolumeSize":1}"#);
    // More often than what is wrong is asked for.
    let answers = std::iter::repeat_n(cut, 7).chain([whole]);
    let (store, sent) = answering(answers.collect()).await;
    let page = tokio::time::timeout(Duration::from_mins(1), first_page(&store)).await.unwrap();
    assert_eq!(page.unwrap().blocks.len(), 1);
    assert_eq!(sent.lock().unwrap().len(), 8);
}
