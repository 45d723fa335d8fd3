use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket};

use super::*;
use crate::livekit::test_server::{TestCa, TestServer, endpoint};

const TIMEOUT: Duration = Duration::from_secs(20);

async fn connect(endpoint: &Endpoint, within: Duration) -> Result<Stream, ConnectError> {
    endpoint.connect(Instant::now() + within).await
}

fn trusting(authority: &TestCa, url: &str) -> Endpoint {
    Endpoint::new(&url.parse().unwrap(), Some(authority.pem.path())).unwrap()
}

fn tls_text(result: Result<Stream, ConnectError>) -> String {
    match result {
        Err(ConnectError::Tls { error, .. }) => error,
        Err(other) => panic!("not a TLS error: {other}"),
        Ok(_) => panic!("connected"),
    }
}

#[tokio::test]
async fn unknown_host_fails_in_the_dns_stage() {
    let error = connect(&endpoint("wss://nonexistent.invalid"), TIMEOUT)
        .await
        .err()
        .unwrap();
    assert!(
        matches!(&error, ConnectError::Dns { host, .. } if host == "nonexistent.invalid"),
        "{error}"
    );
}

#[tokio::test]
async fn closed_port_fails_in_the_tcp_stage_with_its_address() {
    let address = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let error = connect(&endpoint(&format!("ws://{address}")), TIMEOUT)
        .await
        .err()
        .unwrap();
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("TCP connection to {address} failed: ")),
        "{text}"
    );
}

/// A listener whose queue is full drops further connections. On loopback this comes closest to a dead host.
async fn dead_address() -> (SocketAddr, Vec<TcpStream>, TcpListener) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queue = Vec::new();
    while let Ok(stream) =
        tokio::time::timeout(Duration::from_millis(50), TcpStream::connect(address)).await
    {
        queue.push(stream.unwrap());
    }
    (address, queue, listener)
}

#[tokio::test]
async fn dead_first_address_leaves_time_for_the_next() {
    let (dead, _queue, _listener) = dead_address().await;
    let server = TestServer::silent().await;
    let stream = server
        .endpoint()
        .dial(
            &[dead, server.address],
            Instant::now() + Duration::from_secs(1),
        )
        .await
        .unwrap();
    assert_eq!(stream.peer_addr().unwrap(), server.address);
}

#[tokio::test]
async fn host_that_does_not_answer_times_out_in_the_tcp_stage() {
    let (dead, _queue, _listener) = dead_address().await;
    let error = connect(
        &endpoint(&format!("ws://{dead}")),
        Duration::from_millis(100),
    )
    .await
    .err()
    .unwrap();
    let text = error.to_string();
    assert!(
        text.starts_with(&format!(
            "TCP connection to {dead} failed: timed out after "
        )),
        "{text}"
    );
}

#[test]
fn error_names_every_address_that_failed() {
    let addresses = ["10.0.0.1:443", "[fd00::1]:443"].map(|text| text.parse().unwrap());
    let errors = vec![
        (&addresses[0], "refused".to_owned()),
        (&addresses[1], "timed out after 2s".to_owned()),
    ];
    let error = tcp_error("example.com:443".to_owned(), errors);
    assert_eq!(
        error.to_string(),
        "TCP connection to example.com:443 failed: \
             10.0.0.1:443: refused; [fd00::1]:443: timed out after 2s"
    );
}

#[tokio::test]
async fn server_with_a_private_ca_is_trusted_with_its_ca_file() {
    let authority = TestCa::new();
    let server = authority
        .server("localhost", 2999, "HTTP/1.1 200 OK\r\n\r\n")
        .await;
    let url = format!("wss://localhost:{}", server.address.port());
    let mut stream = connect(&trusting(&authority, &url), TIMEOUT).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    stream.flush().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "HTTP/1.1 200 OK\r\n\r\n");
}

#[tokio::test]
async fn error_for_an_untrusted_issuer_mentions_ca_file() {
    let server = TestCa::new().server("localhost", 2999, "").await;
    let url = format!("wss://localhost:{}", server.address.port());
    let text = tls_text(connect(&endpoint(&url), TIMEOUT).await);
    assert!(text.contains("issuer is not trusted"), "{text}");
    assert!(text.contains("ca_file"), "{text}");
}

#[tokio::test]
async fn error_for_a_certificate_of_another_name_gives_that_name() {
    let authority = TestCa::new();
    let server = authority.server("other.example", 2999, "").await;
    let url = format!("wss://localhost:{}", server.address.port());
    let text = tls_text(connect(&trusting(&authority, &url), TIMEOUT).await);
    assert_eq!(text, "the certificate is for another name: other.example");
}

#[tokio::test]
async fn error_for_an_expired_certificate_gives_the_expiry() {
    let authority = TestCa::new();
    let server = authority.server("localhost", 2001, "").await;
    let url = format!("wss://localhost:{}", server.address.port());
    let text = tls_text(connect(&trusting(&authority, &url), TIMEOUT).await);
    assert_eq!(text, "the certificate expired at 2001-12-31 00:00:00 UTC");
}

#[tokio::test]
async fn error_for_a_port_without_tls_names_the_cause() {
    let server = TestServer::start(|mut stream| async move {
        stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            .await
            .unwrap();
        let mut sink = [0; 1024];
        while matches!(stream.read(&mut sink).await, Ok(1..)) {}
    })
    .await;
    let text = tls_text(connect(&endpoint(&format!("wss://{}", server.address)), TIMEOUT).await);
    assert_eq!(text, "the port does not speak TLS");
}

#[tokio::test]
async fn handshake_without_an_answer_times_out_in_the_tls_stage() {
    let server = TestServer::silent().await;
    let url = format!("wss://{}", server.address);
    let text = tls_text(connect(&endpoint(&url), Duration::from_millis(100)).await);
    assert!(text.starts_with("timed out after "), "{text}");
}

#[test]
fn endpoint_retains_the_base_path_and_drops_credentials_and_query() {
    let endpoint = endpoint("wss://user:hidden@example.com:8443/base/?token=hidden#hidden");
    assert_eq!(endpoint.target("/rtc"), "/base/rtc");
    assert_eq!(endpoint.authority(), "example.com:8443");
    assert_eq!(endpoint.url.as_str(), "wss://example.com:8443/base/");
}

#[test]
fn host_header_omits_a_default_port_and_retains_the_brackets_of_ipv6() {
    assert_eq!(endpoint("wss://example.com").authority(), "example.com");
    assert_eq!(endpoint("ws://[::1]:7880").authority(), "[::1]:7880");
}

#[test]
fn unusable_url_or_ca_file_is_refused_with_the_reason() {
    let refused = |url: &str, file: Option<&Path>| {
        let error = Endpoint::new(&url.parse().unwrap(), file).err().unwrap();
        format!("{error:#}")
    };
    assert_eq!(
        refused("ftp://example.com", None),
        "scheme \"ftp\" is not one of wss, ws, https, http"
    );
    let missing = Path::new("missing.pem");
    assert!(refused("wss://example.com", Some(missing)).starts_with("cannot read missing.pem"));
    let empty = tempfile::NamedTempFile::new().unwrap();
    assert!(
        refused("wss://example.com", Some(empty.path())).ends_with("contains no PEM certificate")
    );
}
