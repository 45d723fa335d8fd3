//! The signal socket of one participant: frames in, frames out, pings, and the faults that a socket can have.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use livekit_protocol as proto;
use prost::Message as _;
use proto::signal_request::Message as Up;
use proto::signal_response::Message as Down;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{
    CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode,
};
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_util::sync::CancellationToken;

use super::command::{JoinedClient, RoomCommand, leave};
use super::fault::FaultAction;
use super::ids::unix_millis;
use super::registry::RoomHandle;

/// How long a fault hangs before it closes the connection.
pub(crate) const HANG: Duration = Duration::from_mins(2);

/// The largest message that a client may send; a session description is some 20 KiB.
const MAX_MESSAGE: usize = 1 << 20;
const UPGRADE_TIMEOUT: Duration = Duration::from_secs(10);
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may take to answer a close; shorter than the sandbox's own drain.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// The announced ping timeout plus a margin for the network.
const SILENCE: Duration = Duration::from_secs(20);
/// Messages per flood: some 200 MB.
const FLOOD_MESSAGES: usize = 200_000;

type SignalSocket = WebSocketStream<TokioIo<Upgraded>>;

/// How a signal socket begins.
pub(crate) enum SignalOpening {
    Session {
        room: RoomHandle,
        joined: JoinedClient,
        fault: Option<FaultAction>,
    },
    /// A reconnect that can't be resumed: the client must connect again.
    StateMismatch,
    /// The fault that comes before the join response.
    Misbehave(FaultAction),
}

/// Serves one signal socket to its end.
pub(crate) async fn run(upgrade: OnUpgrade, opening: SignalOpening, shutdown: CancellationToken) {
    let upgraded = tokio::time::timeout(UPGRADE_TIMEOUT, upgrade).await;
    let socket = match upgraded {
        Ok(Ok(upgraded)) => Some(websocket(upgraded).await),
        _ => None,
    };
    match (opening, socket) {
        (
            SignalOpening::Session {
                room,
                joined,
                fault,
            },
            socket,
        ) => {
            let number = joined.number;
            if let Some(mut socket) = socket {
                let served = serve(&mut socket, &room, joined, fault, &shutdown).await;
                if served.is_err() {
                    tracing::debug!("a signal socket broke");
                }
            }
            room.send(RoomCommand::SignalClosed(number)).await;
        }
        (SignalOpening::StateMismatch, Some(mut socket)) => {
            let message = Down::Leave(proto::LeaveRequest {
                can_reconnect: true,
                reason: proto::DisconnectReason::StateMismatch.into(),
                action: proto::leave_request::Action::Reconnect.into(),
                ..proto::LeaveRequest::default()
            });
            if send(&mut socket, message).await.is_ok() {
                close(&mut socket).await;
            }
        }
        (SignalOpening::Misbehave(action), Some(mut socket)) => {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = misbehave(&mut socket, action) => {}
            }
        }
        (_, None) => {}
    }
}

async fn websocket(upgraded: Upgraded) -> SignalSocket {
    let mut config = WebSocketConfig::default();
    config.max_message_size = Some(MAX_MESSAGE);
    config.max_frame_size = Some(MAX_MESSAGE);
    WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(config)).await
}

/// The socket can't be used any more.
struct BrokenSocket;

async fn serve(
    socket: &mut SignalSocket,
    room: &RoomHandle,
    mut joined: JoinedClient,
    fault: Option<FaultAction>,
    shutdown: &CancellationToken,
) -> Result<(), BrokenSocket> {
    send(socket, Down::Join(*joined.join)).await?;
    if let Some(action) = fault {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = misbehave(socket, action) => {}
        }
        return Ok(());
    }
    loop {
        tokio::select! {
            message = joined.messages.recv() => {
                let Some(message) = message else {
                    // The room has removed the participant and sent its last message.
                    close(socket).await;
                    return Ok(());
                };
                send(socket, message).await?;
            }
            frame = tokio::time::timeout(SILENCE, socket.next()) => {
                let Ok(Some(Ok(frame))) = frame else {
                    return Err(BrokenSocket);
                };
                match frame {
                    Message::Binary(bytes) => on_request(socket, room, joined.number, &bytes).await?,
                    Message::Close(_) => return Ok(()),
                    _ => {}
                }
            }
        }
    }
}

async fn on_request(
    socket: &mut SignalSocket,
    room: &RoomHandle,
    number: u64,
    bytes: &[u8],
) -> Result<(), BrokenSocket> {
    let request = proto::SignalRequest::decode(bytes).map_err(|_| BrokenSocket)?;
    match request.message {
        Some(Up::Ping(_)) => send(socket, Down::Pong(unix_millis())).await,
        Some(Up::PingReq(request)) => {
            let pong = proto::Pong {
                last_ping_timestamp: request.timestamp,
                timestamp: unix_millis(),
            };
            send(socket, Down::PongResp(pong)).await
        }
        // A room that has closed also closes the queue of messages, which ends the socket.
        Some(message) => {
            room.send(RoomCommand::Signal(number, Box::new(message)))
                .await;
            Ok(())
        }
        None => Ok(()),
    }
}

async fn send(socket: &mut SignalSocket, message: Down) -> Result<(), BrokenSocket> {
    let message = proto::SignalResponse {
        message: Some(message),
    };
    let frame = Message::Binary(message.encode_to_vec().into());
    match tokio::time::timeout(WRITE_TIMEOUT, socket.send(frame)).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(BrokenSocket),
    }
}

/// Closes the socket and reads what still arrives. Unread bytes would make the kernel reset the connection, and the
/// client would lose the `Leave` that was sent before.
async fn close(socket: &mut SignalSocket) {
    let normal = CloseFrame {
        code: CloseCode::Normal,
        reason: "".into(),
    };
    let closing = async {
        socket.close(Some(normal)).await?;
        while let Some(frame) = socket.next().await {
            frame?;
        }
        Ok::<(), tungstenite::Error>(())
    };
    match tokio::time::timeout(CLOSE_TIMEOUT, closing).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a signal socket broke while it closed"),
        Err(_) => tracing::debug!("a client left its signal socket half open"),
    }
}

async fn turn_away(socket: &mut SignalSocket, reason: proto::DisconnectReason) {
    if send(socket, leave(reason)).await.is_ok() {
        close(socket).await;
    }
}

async fn misbehave(socket: &mut SignalSocket, action: FaultAction) {
    match action {
        FaultAction::Leave => turn_away(socket, proto::DisconnectReason::JoinFailure).await,
        FaultAction::Remove => turn_away(socket, proto::DisconnectReason::ParticipantRemoved).await,
        FaultAction::Drop => {}
        FaultAction::Hang => tokio::time::sleep(HANG).await,
        FaultAction::Flood => {
            for _ in 0..FLOOD_MESSAGES {
                let message = Down::RoomUpdate(proto::RoomUpdate {
                    room: Some(proto::Room {
                        metadata: "flood ".repeat(170),
                        ..proto::Room::default()
                    }),
                });
                if send(socket, message).await.is_err() {
                    return;
                }
            }
        }
    }
}
