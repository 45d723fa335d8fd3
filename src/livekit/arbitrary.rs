//! Parts of property tests: a runner for asynchronous tests, and inputs that resemble a server's messages.
//!
//! A failed test prints the smallest failing input that it found. No regression files are written.

use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};
use tokio::time::timeout;

/// A case that takes longer than this is blocked.
const CASE_TIMEOUT: Duration = Duration::from_secs(30);

/// Runs `test` on `cases` inputs, all on the same runtime.
pub(crate) fn check<S: Strategy>(cases: u32, inputs: &S, test: impl AsyncFn(S::Value)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let result = TestRunner::new(config(cases)).run(inputs, |input| {
        let tested = runtime.block_on(async { timeout(CASE_TIMEOUT, test(input)).await });
        prop_assert!(tested.is_ok(), "the case is blocked");
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

pub(crate) fn config(cases: u32) -> Config {
    Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 500,
        ..Config::default()
    }
}

/// Random bytes without structure.
pub(crate) fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..max)
}

/// Bytes with the structure of a protobuf: fields with any number and wire type, some of which are messages again.
pub(crate) fn protobuf() -> impl Strategy<Value = Vec<u8>> {
    let varint = any::<u64>().prop_map(|value| {
        let mut bytes = Vec::new();
        prost::encoding::encode_varint(value, &mut bytes);
        (0, bytes)
    });
    let fixed = any::<u64>().prop_map(|value| (1, value.to_le_bytes().to_vec()));
    let text = bytes(20).prop_map(|content| (2, delimited(&content)));
    let leaf = prop_oneof![varint, fixed, text];
    let field = leaf.prop_recursive(4, 32, 6, |inner| {
        let fields = prop::collection::vec((1..40_u64, inner), 0..6);
        fields.prop_map(|fields| (2, delimited(&message(&fields))))
    });
    prop::collection::vec((1..40_u64, field), 0..6).prop_map(|fields| message(&fields))
}

fn delimited(content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    prost::encoding::encode_varint(content.len() as u64, &mut bytes);
    bytes.extend_from_slice(content);
    bytes
}

fn message(fields: &[(u64, (u64, Vec<u8>))]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, (wire_type, content)) in fields {
        prost::encoding::encode_varint((number << 3) | wire_type, &mut bytes);
        bytes.extend_from_slice(content);
    }
    bytes
}

/// A change to a text that consists of lines.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Remove(Index),
    Repeat(Index, Index),
    Swap(Index, Index),
    /// Inserts a line.
    Insert(Index, String),
    /// Replaces a word of a line.
    Replace(Index, Index, String),
    Cut(Index),
}

/// A few changes. Inserted lines and words come from `lines` and `words`, or are random.
pub(crate) fn changes(
    lines: &'static [&'static str],
    words: &'static [&'static str],
) -> impl Strategy<Value = Vec<Change>> {
    let index = any::<Index>;
    let line = prop_oneof![select(lines).prop_map(str::to_owned), "[ -~]{0,40}"];
    let word = prop_oneof![
        select(words).prop_map(str::to_owned),
        any::<u64>().prop_map(|number| number.to_string()),
        "[ -~]{0,12}",
        ".{0,3}",
    ];
    let change = prop_oneof![
        1 => index().prop_map(Change::Remove),
        1 => (index(), index()).prop_map(|(from, to)| Change::Repeat(from, to)),
        1 => (index(), index()).prop_map(|(one, other)| Change::Swap(one, other)),
        1 => (index(), line).prop_map(|(at, line)| Change::Insert(at, line)),
        4 => (index(), index(), word).prop_map(|(line, word, by)| Change::Replace(line, word, by)),
        1 => index().prop_map(Change::Cut),
    ];
    prop::collection::vec(change, 0..6)
}

/// The changed text; `end` terminates each line.
pub(crate) fn changed(text: &str, changes: &[Change], end: &str) -> String {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    for change in changes {
        if lines.is_empty() {
            break;
        }
        let count = lines.len();
        match change {
            Change::Remove(at) => drop(lines.remove(at.index(count))),
            Change::Repeat(from, to) => {
                let line = lines[from.index(count)].clone();
                lines.insert(to.index(count), line);
            }
            Change::Swap(one, other) => lines.swap(one.index(count), other.index(count)),
            Change::Insert(at, line) => lines.insert(at.index(count), line.clone()),
            Change::Replace(at, word, by) => {
                let line = &mut lines[at.index(count)];
                *line = replaced(line, *word, by);
            }
            Change::Cut(at) => lines.truncate(at.index(count)),
        }
    }
    let mut text = lines.join(end);
    text.push_str(end);
    text
}

/// Words end at white space, `:`, `=`, `;` and `/`.
fn replaced(line: &str, word: Index, by: &str) -> String {
    let words: Vec<&str> = line.split_inclusive([' ', ':', '=', ';', '/']).collect();
    if words.is_empty() {
        return by.to_owned();
    }
    let at = word.index(words.len());
    let ending = words[at].chars().last().filter(|it| " :=;/".contains(*it));
    let mut line = words[..at].concat();
    line.push_str(by);
    line.extend(ending);
    line.push_str(&words[at + 1..].concat());
    line
}

/// A subscriber offer of livekit-server 1.13.5: a data channel and an agent's voice.
pub(crate) const OFFER: &str = include_str!("native/peer/offer.sdp");

/// livekit-server's answer to our publisher offer, with `MID` as the id of the m-line.
pub(crate) const ANSWER: &str = include_str!("native/peer/answer.sdp");

/// Changes to a session description.
pub(crate) fn sdp_changes() -> impl Strategy<Value = Vec<Change>> {
    changes(
        &[
            "a=candidate:1 1 udp 1 127.0.0.1 9 typ host",
            "a=candidate:1 1 tcp 1 127.0.0.1 9 typ host tcptype passive",
            "a=inactive",
            "a=recvonly",
            "a=mid:0",
            "a=setup:active",
            "a=setup:passive",
            "a=ice-lite",
            "a=rtcp-mux",
            "a=rtpmap:111 opus/48000/2",
            "a=fmtp:111 minptime=10;useinbandfec=1",
            "a=ssrc:1 cname:x",
            "a=msid:PA_a|TR_b TR_b",
            "a=simulcast:send f;h;q",
            "a=rid:f send",
            "a=end-of-candidates",
            "m=audio 9 UDP/TLS/RTP/SAVPF 111",
            "m=video 9 UDP/TLS/RTP/SAVPF 96",
            "m=application 9 UDP/DTLS/SCTP webrtc-datachannel",
        ],
        &[
            "", "-1", "0", "111", "65536", "audio", "video", "udp", "sha-256", "opus", "actpass",
            "active", "00:11", "BUNDLE", "é", "IP6", "::1",
        ],
    )
}

/// The changed description, without candidates that are not on loopback: a test must not send packets elsewhere.
pub(crate) fn sdp(text: &str, changes: &[Change]) -> String {
    let text = changed(text, changes, "\r\n");
    let lines = text
        .split_inclusive("\r\n")
        .filter(|line| !line.contains("candidate") || is_on_loopback(line));
    lines.collect()
}

fn is_on_loopback(candidate: &str) -> bool {
    let mut words = candidate.split_whitespace();
    words.all(|word| {
        word.parse::<std::net::IpAddr>()
            .map_or(true, |address| address.is_loopback())
    })
}

/// The line of a candidate. If it has an address, the address is on loopback.
pub(crate) fn candidate() -> impl Strategy<Value = String> {
    let word = |known: &'static [&'static str]| prop_oneof![6 => select(known).prop_map(str::to_owned), 1 => "[ -~]{0,8}"];
    let address = word(&["127.0.0.1", "127.1.2.3", "::1", "host.local", "127.0.0.1:9"]);
    let number = prop_oneof![any::<u16>().prop_map(u64::from), any::<u64>()];
    let parts = (
        word(&["udp", "tcp", "UDP", "ssltcp"]),
        number.clone(),
        address,
        number,
        word(&["host", "srflx", "relay", "prflx"]),
        word(&[
            "",
            "tcptype passive",
            "tcptype active",
            "raddr 127.0.0.1 rport 9",
            "ufrag x",
        ]),
    );
    let formed = parts.prop_map(|(proto, priority, address, port, kind, rest)| {
        format!("candidate:1 1 {proto} {priority} {address} {port} typ {kind} {rest}")
    });
    let line = prop_oneof![6 => formed, 1 => "\\PC{0,60}"];
    line.prop_filter("off loopback", |line| is_on_loopback(line))
}
