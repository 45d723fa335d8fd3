//! The rows of the fault matrix, and how each fault is caused.

use anyhow::Context as _;
use livekit_canary::probe::{LimitKind, Origin, Reason};
use rustix::process::Signal;
use support::behaviour::Behaviour;
use support::daemon::NO_LINGER;
use support::gate::{Gate, Hold};
use support::process::kill;
use support::settings::Settings;
use support::stack::{AGENT, Agent, AgentEvent, Stack};
use support::{SECRET, SHORT_TIMEOUT, wait_for};

use super::OnStack::{Can, Cannot};
use super::{DaemonBatch, Expected, Fault, Observation, conversation};
use crate::agents::take_identity;
use crate::fixture::{Fixture, reason_by_listed_jobs, wait_for_job};
use crate::proxy::{Interceptor, TlsProxy};

const NO_PROCESS: &str = "its agent is not a separate process";
const NO_NETWORK: &str = "it listens on 127.0.0.1 only, so there is no network in between";
const NO_PERMISSIONS: &str = "it can't revoke a permission";
const NO_SETTING: &str = "it has no such setting";
const NO_PARTIAL: &str = "it responds completely or not at all";
const NO_LEAVE: &str = "it rejects the upgrade instead, with only HTTP 500";
const ONE_NODE: &str = "a single node already rejects CreateRoom: see full_node";
const LISTED: &str = "it may list a running job or not: see agent_that_never_connects";

macro_rules! faults {
    ($($name:ident: $verdict:expr, $origin:expr, $slis:literal, within $within:literal, $evidence:expr,
        sandbox $sandbox:expr, real $real:expr $(, mock $mock:expr)?;)*) => {
        pub(crate) static FAULTS: &[Fault] = &[
            $(Fault {
                name: stringify!($name),
                expected: $verdict,
                origin: $origin,
                slis: $slis,
                within: $within,
                evidence: &$evidence,
                sandbox: $sandbox,
                real: $real,
                mock: faults!(@ $($mock)?),
            },)*
        ];
    };
    (@) => { None };
    (@ $mock:expr) => { Some($mock) };
}

const fn failed(reason: Reason) -> Expected {
    Expected::Failed(reason)
}

const fn limit(kind: LimitKind) -> Expected {
    Expected::Failed(Reason::PlanLimit(kind))
}

// The longest first, so that no long one runs alone at the end.
faults! {
    server_freezes: failed(Reason::SignalLost), Some(Origin::Livekit), "...-.", within 50,
        [r#""step":"signal""#, r#""deadline_seconds":15.0"#, "hangs"],
        sandbox Can(server_freezes), real Can(server_freezes);
    job_is_killed: failed(Reason::AgentLeftEarly), Some(Origin::Agent), "-++-.", within 55,
        [r#""step":"agent""#, "CONNECTION_TIMEOUT", "crash"],
        sandbox Cannot(NO_PROCESS), real Can(job_is_killed);
    full_node: limit(LimitKind::Node), Some(Origin::Limit), "...-.", within 10,
        [r#""step":"create_room""#, "reached configured limit for node", "raise the limits of the server"],
        sandbox Cannot(NO_SETTING), real Can(full_node);
    blocked_media: failed(Reason::MediaFailed), Some(Origin::Network), "...-.", within 20,
        [r#""step":"media""#, r#""deadline_seconds":5.0"#, "Check UDP and TCP", "LiveKit expects media at UDP "],
        sandbox Can(|fixture| server_fault(fixture, "no_media")), real Can(blocked_media);
    broken_media: failed(Reason::MediaFailed), Some(Origin::Network), "...-.", within 40,
        [r#""step":"media""#, "Check UDP and TCP", "LiveKit expects media at TCP "],
        sandbox Cannot(NO_NETWORK), real Can(broken_media);
    server_is_killed: failed(Reason::SignalLost), Some(Origin::Livekit), "...-.", within 30,
        [r#""step":"signal""#, "killed or restarted, or hangs"],
        sandbox Can(server_is_killed), real Can(server_is_killed);

    // No failure.
    nothing: Expected::Ok, None, "++++.", within 60, [r#""step":null"#],
        sandbox Can(nothing), real Can(nothing);
    agent_joins_late: Expected::Ok, None, "+--+.", within 60, [r#""step":null"#],
        sandbox Can(agent_joins_late), real Can(agent_joins_late);
    daemon_is_stopped: Expected::Aborted, None, ".....", within 60, [r#""reason":null"#],
        sandbox Can(daemon_is_stopped), real Can(daemon_is_stopped);

    // The agent fails.
    agent_that_never_joins: failed(Reason::AgentNoShow), Some(Origin::Agent), "----.", within 15,
        [r#""step":"agent_join""#, r#""deadline_seconds":4.0"#, "JS_RUNNING", "a worker accepted the job"],
        sandbox Can(never_joins), real Cannot(LISTED);
    agent_that_never_connects: failed(Reason::AgentNoShow), Some(Origin::Agent), "----.", within 20,
        [r#""step":"agent_join""#, r#""deadline_seconds":4.0"#, "for agent \\\"echo-tester\\\""],
        sandbox Can(never_connects), real Can(never_connects);
    agent_that_fails_before_it_connects: failed(Reason::AgentNoShow), Some(Origin::Agent), "----.", within 20,
        [r#""step":"agent_join""#, r#""deadline_seconds":4.0"#, "for agent \\\"echo-tester\\\""],
        sandbox Can(fails), real Can(fails);
    no_worker: failed(Reason::DispatchUnanswered), Some(Origin::Undetermined), "----.", within 15,
        [r#""step":"agent_join""#, r#""deadline_seconds":4.0"#, "no job", "Check first that a worker registered"],
        sandbox Can(no_worker), real Can(no_worker);
    busy_worker: failed(Reason::DispatchUnanswered), Some(Origin::Undetermined), "----.", within 15,
        [r#""step":"agent_join""#, "no job", "below its load limit"],
        sandbox Can(busy_worker), real Can(busy_worker);
    wrong_agent_name: failed(Reason::DispatchUnanswered), Some(Origin::Undetermined), "----.", within 15,
        [r#""step":"agent_join""#, r#"exactly \"no-such-agent\""#],
        sandbox Can(wrong_agent_name), real Can(wrong_agent_name);
    agent_without_a_track: failed(Reason::AgentNoTrack), Some(Origin::Agent), "-+--.", within 20,
        [r#""step":"agent_track""#, r#""deadline_seconds":3.0"#, "(AGENT, agent name"],
        sandbox Can(no_track), real Can(no_track);
    agent_without_packets: failed(Reason::AgentSilent), Some(Origin::Agent), "-+--.", within 20,
        [r#""step":"agent_speech""#, r#""deadline_seconds":4.0"#, "no audio packet arrived on its track"],
        sandbox Can(no_packets), real Can(no_packets);
    agent_with_a_track_of_silence: failed(Reason::AgentSilent), Some(Origin::Agent), "-+--.", within 20,
        [r#""step":"agent_speech""#, r#""deadline_seconds":4.0"#, "audio packets, but no speech in them"],
        sandbox Can(silence), real Can(silence);
    agent_without_a_reply: failed(Reason::AgentNoReply), Some(Origin::Agent), "-++--", within 40,
        [r#""step":"agent_reply""#, r#""deadline_seconds":3.0"#, "Check its"],
        sandbox Can(no_reply), real Can(no_reply);
    agent_that_hangs_up: failed(Reason::AgentLeftEarly), Some(Origin::Agent), "-++-.", within 40,
        [r#""step":"agent""#, "the agent left (", "while the room was still open"],
        sandbox Can(hangs_up), real Can(hangs_up);
    two_dispatches: failed(Reason::AgentDuplicate), Some(Origin::Agent), "-++-.", within 30,
        [r#""step":"agent""#, "a second agent of that name joined (agent-"],
        sandbox Can(two_dispatches), real Can(two_dispatches);

    // The conversation fails.
    deaf_agent: failed(Reason::AgentNoReply), Some(Origin::Agent), "-++--", within 50,
        [r#""step":"agent_reply""#, r#""deadline_seconds":4.0"#, "LiveKit received the caller's speech", r#""confirmed":false"#],
        sandbox Can(conversation::deaf), real Can(conversation::deaf);
    agent_that_goes_deaf_in_turn_3: failed(Reason::AgentNoReply), Some(Origin::Agent), "-++--", within 80,
        [r#""step":"agent_reply""#, "in turn 3 of 4", r#""result":"answered""#],
        sandbox Can(conversation::deaf_later), real Can(conversation::deaf_later);
    agent_with_a_dead_llm: failed(Reason::AgentNoReply), Some(Origin::Agent), "-++--", within 50,
        [r#""step":"agent_reply""#, "It spoke, but that was no answer", "Its session reported an error"],
        sandbox Can(conversation::dead_llm), real Can(conversation::dead_llm);
    agent_that_never_yields: failed(Reason::AgentNotYielding), Some(Origin::Agent), "-++-+", within 60,
        [r#""step":"agent_yield""#, "Check whether it allows interruptions", r#""interrupts":true"#],
        sandbox Can(conversation::never_yields), real Can(conversation::never_yields);
    reply_with_wrong_words: failed(Reason::AgentWrongReply), Some(Origin::Agent), "-+.-+", within 50,
        [r#""step":"agent_reply""#, "Check its transcript", "table|seat"],
        sandbox Can(conversation::wrong_words), real Can(conversation::wrong_words);
    tool_that_does_not_run: failed(Reason::AgentWrongReply), Some(Origin::Agent), "-+.-+", within 50,
        [r#""step":"agent_reply""#, "its tools", "book_table"],
        sandbox Can(conversation::no_tool), real Can(conversation::no_tool);
    noise_instead_of_a_voice: failed(Reason::AgentSilent), Some(Origin::Agent), "-+--.", within 30,
        [r#""step":"agent_speech""#, "audio packets, but no speech in them"],
        sandbox Can(conversation::noise), real Can(conversation::noise);
    agent_that_waits_for_an_echo: failed(Reason::AgentSilent), Some(Origin::Agent), "-+--.", within 30,
        [r#""step":"agent_speech""#, "caller.speaks_first"],
        sandbox Can(conversation::waits_for_an_echo), real Can(conversation::waits_for_an_echo);
    agent_that_waits_for_the_caller: Expected::Ok, None, "++.++", within 50,
        [r#""step":null"#, r#""result":"answered""#],
        sandbox Can(conversation::waits_for_the_caller), real Can(conversation::waits_for_the_caller);
    lost_uplink: failed(Reason::MediaFailed), Some(Origin::Network), "...-.", within 50,
        [r#""step":"media""#, "the caller's speech did not reach LiveKit"],
        sandbox Can(conversation::lost_uplink_of_the_sandbox), real Can(conversation::lost_uplink);

    // LiveKit fails.
    create_room_is_refused: failed(Reason::RoomCreateFailed), Some(Origin::Livekit), "...-.", within 10,
        [r#""step":"create_room""#, r#""http_status":500"#, "LiveKit refused CreateRoom"],
        sandbox Can(|fixture| server_fault(fixture, "create_room=500")),
        real Can(|fixture| intercepted(fixture, "http-request return status 500 if { path_end /CreateRoom }"));
    room_is_refused_by_a_setting: failed(Reason::RoomCreateFailed), Some(Origin::Livekit), "...-.", within 10,
        [r#""step":"create_room""#, r#""http_status":400"#, r#""twirp_code":"invalid_argument""#, "metadata"],
        sandbox Cannot(NO_SETTING), real Can(metadata_is_too_long);
    create_room_hangs: failed(Reason::RoomCreateFailed), Some(Origin::Livekit), "...-.", within 15,
        [r#""step":"create_room""#, r#""deadline_seconds":2.0"#, "no answer within 2s"],
        sandbox Can(|fixture| server_fault(fixture, "create_room=hang")), real Can(server_is_frozen_before);
    create_room_breaks: failed(Reason::RoomCreateFailed), Some(Origin::Livekit), "...-.", within 10,
        [r#""step":"create_room""#, "CreateRoom failed"],
        sandbox Can(|fixture| server_fault(fixture, "create_room=drop")), real Cannot(NO_PARTIAL);
    create_room_floods: failed(Reason::RoomCreateFailed), Some(Origin::Livekit), "...-.", within 10,
        [r#""step":"create_room""#, "CreateRoom failed"],
        sandbox Can(|fixture| server_fault(fixture, "create_room=flood")), real Cannot(NO_PARTIAL);
    dispatch_is_refused: failed(Reason::DispatchFailed), Some(Origin::Livekit), "...-.", within 15,
        [r#""step":"dispatch""#, r#""http_status":500"#, "LiveKit refused CreateDispatch"],
        sandbox Can(|fixture| server_fault(fixture, "create_dispatch=500")),
        real Can(|fixture| intercepted(fixture, "http-request return status 500 if { path_end /CreateDispatch }"));
    dispatch_hangs: failed(Reason::DispatchFailed), Some(Origin::Livekit), "...-.", within 15,
        [r#""step":"dispatch""#, r#""deadline_seconds":2.0"#, "no answer within 2s"],
        sandbox Can(|fixture| server_fault(fixture, "create_dispatch=hang")),
        real Can(|fixture| intercepted(fixture, "http-request silent-drop if { path_end /CreateDispatch }"));
    upgrade_is_refused: failed(Reason::SignalFailed), Some(Origin::Livekit), "...-.", within 10,
        [r#""step":"signal""#, r#""http_status":500"#, "LiveKit refused the signal connection"],
        sandbox Can(|fixture| server_fault(fixture, "upgrade=500")),
        real Can(|fixture| intercepted(fixture, "http-request return status 500 if { path_beg /rtc }")),
        mock |fixture| mocked(fixture, "validate_500");
    upgrade_hangs: failed(Reason::SignalFailed), Some(Origin::Livekit), "...-.", within 15,
        [r#""step":"signal""#, r#""deadline_seconds":3.0"#, "no join response within 3s"],
        sandbox Can(|fixture| server_fault(fixture, "upgrade=hang")),
        real Can(|fixture| intercepted(fixture, "http-request silent-drop if { path_beg /rtc }"));
    room_is_gone_before_we_join: failed(Reason::SignalFailed), Some(Origin::Livekit), "...-.", within 10,
        [r#""step":"signal""#, r#""http_status":404"#, "room does not exist"],
        sandbox Cannot(NO_SETTING), real Can(gone_before_joining);
    no_join_response: failed(Reason::SignalFailed), Some(Origin::Livekit), "...-.", within 15,
        [r#""step":"signal""#, r#""deadline_seconds":3.0"#, "no join response within 3s"],
        sandbox Can(|fixture| server_fault(fixture, "before_join=hang")), real Cannot(NO_PARTIAL),
        mock |fixture| mocked(fixture, "no_first_message");
    closed_before_the_join_response: failed(Reason::SignalFailed), Some(Origin::Livekit), "...-.", within 10,
        [r#""step":"signal""#, "joining failed"],
        sandbox Can(|fixture| server_fault(fixture, "before_join=drop")), real Cannot(NO_PARTIAL),
        mock |fixture| mocked(fixture, "close_before_join");
    flood_before_the_join_response: failed(Reason::SignalFailed), Some(Origin::Livekit), "...-.", within 10,
        [r#""step":"signal""#, "joining failed"],
        sandbox Can(|fixture| server_fault(fixture, "before_join=flood")), real Cannot(NO_PARTIAL);
    leave_instead_of_the_join_response: failed(Reason::SignalFailed), Some(Origin::Livekit), "...-.", within 10,
        [r#""step":"signal""#, "Leave SERVER_SHUTDOWN", "before the join response"],
        sandbox Cannot("its Leave message is that of a full room: see full_room"), real Cannot(NO_LEAVE),
        mock |fixture| mocked(fixture, "leave_first_message");
    connection_drops: failed(Reason::SignalLost), Some(Origin::Livekit), "...-.", within 15,
        [r#""step":"signal""#, "killed or restarted, or hangs"],
        sandbox Can(|fixture| server_fault(fixture, "after_join=drop")), real Cannot(NO_PARTIAL),
        mock |fixture| mocked(fixture, "drop_when_connected");
    connection_closes: failed(Reason::SignalLost), Some(Origin::Livekit), "...-.", within 15,
        [r#""step":"signal""#, "the signal connection closed: code 1011"],
        sandbox Cannot("it breaks the connection without a close frame"), real Cannot(NO_PARTIAL),
        mock |fixture| mocked(fixture, "close_when_connected");
    no_pong: failed(Reason::SignalLost), Some(Origin::Livekit), "...-.", within 15,
        [r#""step":"signal""#, r#""deadline_seconds":3.0"#],
        sandbox Cannot("its ping timeout is fixed: see server_freezes"), real Cannot("its ping timeout is fixed: see server_freezes"),
        mock |fixture| mocked(fixture, "no_pong");
    server_shuts_down: failed(Reason::SignalLost), Some(Origin::Livekit), "...-.", within 15,
        ["Leave SERVER_SHUTDOWN", "restarted or drained"],
        sandbox Cannot("its Leave message is that of a lost connection"), real Cannot("it drains, and sends no Leave message during a call"),
        mock |fixture| mocked(fixture, "leave_when_connected");
    flood_after_the_join_response: failed(Reason::SignalLost), Some(Origin::Livekit), "...-.", within 15,
        [r#""step":"signal""#],
        sandbox Can(|fixture| server_fault(fixture, "after_join=flood")), real Cannot(NO_PARTIAL);
    track_is_not_acknowledged: failed(Reason::PublishFailed), Some(Origin::Livekit), "...-.", within 20,
        [r#""step":"publish""#, r#""deadline_seconds":5.0"#, "did not acknowledge the echo track"],
        sandbox Can(|fixture| server_fault(fixture, "after_join=hang")), real Cannot("it always acknowledges or rejects a track: see audio_is_not_allowed"),
        mock |fixture| mocked(fixture, "happy");
    audio_is_not_allowed: failed(Reason::PublishFailed), Some(Origin::Livekit), "...-.", within 20,
        [r#""step":"publish""#, "does not understand the server's SDP answer", "enabled_codecs"],
        sandbox Cannot(NO_SETTING), real Can(no_audio_codec);

    // The network fails.
    closed_port: failed(Reason::Unreachable), Some(Origin::Network), "...-.", within 10,
        [r#""step":"create_room""#, "127.0.0.1:1", "Check that LiveKit runs there"],
        sandbox Can(|fixture| elsewhere(fixture, "ws://127.0.0.1:1")),
        real Can(|fixture| elsewhere(fixture, "ws://127.0.0.1:1"));
    unknown_host: failed(Reason::Unreachable), Some(Origin::Network), "...-.", within 30,
        [r#""step":"create_room""#, "no-such-host.invalid", "resolver"],
        sandbox Can(|fixture| elsewhere(fixture, "ws://no-such-host.invalid:7880")),
        real Can(|fixture| elsewhere(fixture, "ws://no-such-host.invalid:7880"));
    untrusted_certificate: failed(Reason::Unreachable), Some(Origin::Network), "...-.", within 10,
        [r#""step":"create_room""#, "issuer is not trusted", "ca_file"],
        sandbox Can(untrusted_certificate), real Can(untrusted_certificate);
    certificate_for_another_name: failed(Reason::Unreachable), Some(Origin::Network), "...-.", within 10,
        [r#""step":"create_room""#, "elsewhere.test", "Check the certificate and its host name"],
        sandbox Can(certificate_for_another_name), real Can(certificate_for_another_name);

    // Another client interferes.
    room_is_deleted: failed(Reason::Removed), Some(Origin::External), ".....", within 30,
        ["(ROOM_DELETED)", "who deletes rooms"],
        sandbox Can(room_is_deleted), real Can(room_is_deleted);
    participant_is_removed: failed(Reason::Removed), Some(Origin::External), ".....", within 30,
        ["Leave PARTICIPANT_REMOVED", "another program removed the echo participant"],
        sandbox Can(participant_is_removed), real Can(participant_is_removed);
    agent_is_removed: failed(Reason::Removed), Some(Origin::External), ".....", within 30,
        ["another program removed the agent (PARTICIPANT_REMOVED)"],
        sandbox Can(agent_is_removed), real Can(agent_is_removed);
    identity_is_taken: failed(Reason::Removed), Some(Origin::External), ".....", within 30,
        ["Leave DUPLICATE_IDENTITY", "under the echo participant's identity"],
        sandbox Can(identity_is_taken), real Can(identity_is_taken);

    right_to_publish_is_revoked_by_another: failed(Reason::Removed), Some(Origin::External), ".....", within 30,
        [r#""step":"permission""#, "right to publish"],
        sandbox Cannot(NO_PERMISSIONS), real Can(right_to_publish_is_revoked);

    // A limit of the plan. The real server has only one of these limits. For the others, a proxy responds as LiveKit Cloud would.
    too_many_connections: limit(LimitKind::Connections), Some(Origin::Limit), "...-.", within 10,
        [r#""step":"signal""#, r#""http_status":429"#, r#""retry_after_seconds":30.0"#, "retry after 30s"],
        sandbox Can(|fixture| server_fault(fixture, "upgrade=429,retry_after=30s")),
        real Can(|fixture| intercepted(fixture, "http-request return status 429 hdr Retry-After 30 content-type text/plain \
            string \"too many connections\" if { path_beg /rtc }"));
    too_many_calls: limit(LimitKind::ApiRate), Some(Origin::Limit), "...-.", within 10,
        [r#""step":"create_room""#, r#""http_status":429"#, r#""twirp_code":"resource_exhausted""#, "gave no retry time"],
        sandbox Can(|fixture| server_fault(fixture, "create_room=429")),
        real Can(|fixture| intercepted(fixture, "http-request return status 429 content-type application/json \
            string '{\"code\":\"resource_exhausted\",\"msg\":\"rate limit exceeded\"}' if { path_end /CreateRoom }"));
    too_many_calls_for_a_proxy: limit(LimitKind::ApiRate), Some(Origin::Limit), "...-.", within 10,
        [r#""step":"dispatch""#, r#""http_status":429"#, r#""twirp_code":null"#, "Too Many Requests"],
        sandbox Can(|fixture| server_fault(fixture, "create_dispatch=429,html")),
        real Can(|fixture| intercepted(fixture, "http-request return status 429 content-type text/html \
            string '<html><h1>429 Too Many Requests</h1></html>' if { path_end /CreateDispatch }"));
    too_many_agent_sessions: limit(LimitKind::AgentSessions), Some(Origin::Limit), "...-.", within 10,
        [r#""step":"dispatch""#, r#""http_status":429"#, "agent session"],
        sandbox Can(|fixture| server_fault(fixture, "create_dispatch=resource_exhausted")),
        real Can(|fixture| intercepted(fixture, "http-request return status 429 content-type application/json \
            string '{\"code\":\"resource_exhausted\",\"msg\":\"concurrent agent sessions limit reached\"}' \
            if { path_end /CreateDispatch }"));
    spent_quota: limit(LimitKind::Quota), Some(Origin::Limit), "...-.", within 10,
        [r#""step":"create_room""#, "minutes of the plan are used up"],
        sandbox Can(|fixture| intercepted(fixture, SPENT)), real Can(|fixture| intercepted(fixture, SPENT));
    full_node_of_a_cluster: limit(LimitKind::Node), Some(Origin::Limit), "...-.", within 10,
        [r#""step":"signal""#, r#""http_status":503"#, "the LiveKit node is full"],
        sandbox Can(|fixture| server_fault(fixture, "upgrade=503")), real Cannot(ONE_NODE);
    full_room: limit(LimitKind::Room), Some(Origin::Limit), "...-.", within 10,
        [r#""step":"signal""#, "Leave JOIN_FAILURE", "limits on participants and rooms"],
        sandbox Can(|fixture| server_fault(fixture, "before_join=leave")), real Cannot(NO_LEAVE);
    spent_model: limit(LimitKind::Inference), Some(Origin::Limit), "...-.", within 20,
        ["the agent reported an error", "inference_quota_exceeded", "So the agent failed (agent_silent)"],
        sandbox Can(spent_model), real Can(spent_model);
    limit_without_a_name: limit(LimitKind::Other), Some(Origin::Limit), "...-.", within 10,
        [r#""step":"create_room""#, r#""twirp_code":"resource_exhausted""#, "no more of these"],
        sandbox Can(|fixture| server_fault(fixture, "create_room=unnamed")),
        real Can(|fixture| intercepted(fixture, "http-request return status 403 content-type application/json \
            string '{\"code\":\"resource_exhausted\",\"msg\":\"no more of these\"}' if { path_end /CreateRoom }"));

    // The settings are wrong.
    wrong_secret: failed(Reason::AuthRejected), Some(Origin::Config), ".....", within 10,
        [r#""step":"create_room""#, r#""http_status":401"#, "api_key and api_secret"],
        sandbox Can(wrong_secret), real Can(wrong_secret), mock wrong_secret;
    wrong_path: failed(Reason::ConfigRejected), Some(Origin::Config), ".....", within 10,
        [r#""step":"create_room""#, r#""http_status":404"#, "Check the project's url, including its path"],
        sandbox Can(wrong_path), real Can(wrong_path), mock wrong_path;
    no_signal_endpoint: failed(Reason::ConfigRejected), Some(Origin::Config), ".....", within 10,
        [r#""step":"signal""#, r#""http_status":404"#, "the server has no signal endpoint"],
        sandbox Cannot("it always has one"), real Cannot("it always has one"),
        mock |fixture| mocked(fixture, "validate_service_not_found");
    region_pinned_for_the_api: failed(Reason::ConfigRejected), Some(Origin::Config), ".....", within 10,
        [r#""step":"create_room""#, r#""http_status":451"#, "project not allowed in this region", "pinned to a region"],
        sandbox Can(|fixture| pinned(fixture, PINNED_API)), real Can(|fixture| pinned(fixture, PINNED_API)),
        mock |fixture| pinned(fixture, PINNED_MOCK);
    region_pinned_for_signalling: failed(Reason::ConfigRejected), Some(Origin::Config), ".....", within 10,
        [r#""step":"signal""#, r#""http_status":403"#, "pinned to a region"],
        sandbox Can(|fixture| pinned(fixture, PINNED_SIGNAL)), real Can(|fixture| pinned(fixture, PINNED_SIGNAL));

    // The canary fails.
    probe_panics: failed(Reason::Internal), Some(Origin::Canary), ".....", within 40,
        ["the canary itself failed"],
        sandbox Can(probe_panics), real Can(probe_panics);
}

/// What a provider might respond. LiveKit Cloud's own responses are not published.
const SPENT: &str = "http-request return status 429 content-type application/json \
    string '{\"code\":\"resource_exhausted\",\"msg\":\"the minutes of the plan are used up\"}' if { path_end /CreateRoom }";

/// LiveKit Cloud's answers in a region that the project is not pinned to, as upstream's mock mirrors them.
const PINNED_API: &str = "http-request return status 451 content-type text/plain \
    string \"project not allowed in this region.\" if { path_beg /twirp }";
const PINNED_SIGNAL: &str = "http-request return status 403 content-type text/plain \
    string \"project not allowed in this region.\" if { path_beg /rtc }";
/// Has upstream's mock itself refuse the region.
const PINNED_MOCK: &str =
    r#"http-request set-header X-Lk-Mock "{\"pinnedRegions\":[\"elsewhere\"]}""#;

// --- settings ---

/// A target whose schedule starts one batch during the test, a short time after the daemon's start. Only scheduled batches count
/// in service levels.
pub(super) fn one_batch(settings: Settings) -> Settings {
    settings
        .set("schedule.every", "30d")
        .set("batch.hold", "2s")
        .set("late_agent_window", "1s")
        .set("objectives.join_within", "15s")
        .set("objectives.first_speech_within", "20s")
        .set("deadlines.join", "20s")
        .set("deadlines.media", "15s")
}

/// A stack whose agent has this behaviour, and settings that call it.
fn call<'a>(fixture: &'a Fixture, behaviour: &Behaviour) -> anyhow::Result<(&'a Stack, Settings)> {
    let (stack, settings) = fixture.call(behaviour)?;
    Ok((stack, one_batch(settings)))
}

/// One room with such an agent, and with these keys of the target.
fn behaves(
    fixture: &Fixture,
    behaviour: &Behaviour,
    keys: &[(&str, &str)],
) -> anyhow::Result<Observation> {
    let (stack, settings) = call(fixture, behaviour)?;
    DaemonBatch::start(&set(settings, keys))?.finish(stack)
}

fn set(settings: Settings, keys: &[(&str, &str)]) -> Settings {
    let keys = keys.iter();
    keys.fold(settings, |settings, (key, value)| settings.set(key, *value))
}

/// Short deadlines, for a failure of LiveKit, of the network or by a limit.
fn with_short_deadlines(settings: Settings) -> Settings {
    settings
        .project("api_timeout", "2s")
        .set("deadlines.signal", "3s")
        .set("deadlines.media", "5s")
        .set("deadlines.cleanup", "3s")
}

/// A fault of the sandbox's server.
fn server_fault(fixture: &Fixture, fault: &str) -> anyhow::Result<Observation> {
    let behaviour = Behaviour::greets().fault(fault);
    let (stack, settings) = call(fixture, &behaviour)?;
    DaemonBatch::start(&with_short_deadlines(settings))?.finish(stack)
}

/// A proxy in front of the stack that responds by these rules of haproxy.
fn intercepted(fixture: &Fixture, rules: &str) -> anyhow::Result<Observation> {
    let (stack, settings) = call(fixture, &Behaviour::greets())?;
    let proxy = Interceptor::start(stack, rules)?;
    let settings = with_short_deadlines(settings).project("url", proxy.url.as_str());
    DaemonBatch::start(&settings)?.finish(stack)
}

/// A project that is pinned to another region. No room is left, and no warning names one that was refused.
fn pinned(fixture: &Fixture, rules: &str) -> anyhow::Result<Observation> {
    let seen = intercepted(fixture, rules)?;
    seen.expect_no_leak()?;
    Ok(seen)
}

/// Upstream's mock, which `signal` tells what to do.
fn mocked(fixture: &Fixture, signal: &str) -> anyhow::Result<Observation> {
    let stack = fixture.own_stack(&[], &Behaviour::greets())?;
    let control = serde_json::json!({ "signal": signal }).to_string();
    let settings =
        with_short_deadlines(one_batch(Settings::new(stack))).attribute("lk.mock", &control);
    DaemonBatch::start(&settings)?.finish(stack)
}

/// Another address than that of the stack.
fn elsewhere(fixture: &Fixture, url: &str) -> anyhow::Result<Observation> {
    let (stack, settings) = call(fixture, &Behaviour::greets())?;
    DaemonBatch::start(&with_short_deadlines(settings).project("url", url))?.finish(stack)
}

/// A livekit-server with these additional settings, in YAML, and without an agent.
fn configured(fixture: &Fixture, yaml: &str) -> anyhow::Result<Observation> {
    let stack = fixture.own_stack_with(yaml, &[])?;
    DaemonBatch::start(&with_short_deadlines(one_batch(Settings::new(stack))))?.finish(stack)
}

/// A call in which the agent has greeted and stays.
fn greeted<'a>(fixture: &'a Fixture, tag: &str) -> anyhow::Result<Call<'a>> {
    let (stack, settings) = call(fixture, &Behaviour::greets().tag(tag))?;
    Call::start(stack, settings, tag)
}

/// The same on a stack that the fault may harm, and with short timeouts for requests to its server.
fn greeted_alone<'a>(fixture: &'a Fixture, tag: &str) -> anyhow::Result<Call<'a>> {
    let behaviour = Behaviour::greets().tag(tag);
    let stack = fixture.own_stack(&[Agent::named(AGENT)], &behaviour)?;
    let settings = one_batch(Settings::new(stack).behaviour(&behaviour))
        .project("api_timeout", "2s")
        .set("deadlines.cleanup", "2s");
    Call::start(stack, settings, tag)
}

/// A call in which the agent has greeted.
struct Call<'a> {
    stack: &'a Stack,
    tag: String,
    room: String,
    batch: DaemonBatch,
}

impl<'a> Call<'a> {
    fn start(stack: &'a Stack, settings: Settings, tag: &str) -> anyhow::Result<Self> {
        let batch = DaemonBatch::start(&settings.set("batch.hold", "1m"))?;
        let greeted = wait_for_job(stack, tag, "greeted")?;
        Ok(Self {
            stack,
            tag: tag.to_owned(),
            room: greeted.room().to_owned(),
            batch,
        })
    }

    /// Waits for an event of the agent.
    fn event(&self, name: &str) -> anyhow::Result<AgentEvent> {
        wait_for_job(self.stack, &self.tag, name)
    }

    fn finish(self) -> anyhow::Result<Observation> {
        self.batch.finish(self.stack)
    }
}

// --- no failure ---

fn nothing(fixture: &Fixture) -> anyhow::Result<Observation> {
    behaves(fixture, &Behaviour::greets(), &[])
}

fn agent_joins_late(fixture: &Fixture) -> anyhow::Result<Observation> {
    let late = [
        ("objectives.join_within", "1s"),
        ("objectives.first_speech_within", "2s"),
    ];
    behaves(fixture, &Behaviour::greets().after(2), &late)
}

fn daemon_is_stopped(fixture: &Fixture) -> anyhow::Result<Observation> {
    let tag = "daemon-is-stopped";
    let (stack, settings) = call(fixture, &Behaviour::greets().tag(tag))?;
    let settings = settings.set("batch.hold", "40s");
    let lifetime = "lifetime.drain_grace = \"100ms\"\nlifetime.shutdown_linger = \"5s\"";
    let batch = DaemonBatch::start_with(&settings, lifetime, &[])?;
    wait_for_job(stack, tag, "greeted")?;
    batch.stop(stack)
}

// --- the agent ---

/// A short deadline for an agent that doesn't join.
const SHORT_JOIN: [(&str, &str); 2] = [("deadlines.join", "4s"), ("objectives.join_within", "3s")];

fn never_joins(fixture: &Fixture) -> anyhow::Result<Observation> {
    behaves(fixture, &Behaviour::never_connects(), &SHORT_JOIN)
}

fn never_connects(fixture: &Fixture) -> anyhow::Result<Observation> {
    listed_or_not(
        fixture,
        Behaviour::never_connects(),
        "never-connects-in-the-matrix",
    )
}

fn fails(fixture: &Fixture) -> anyhow::Result<Observation> {
    listed_or_not(fixture, Behaviour::fails(), "fails-in-the-matrix")
}

/// An agent that accepted its job and doesn't join. The server may list the job or not.
fn listed_or_not(
    fixture: &Fixture,
    behaviour: Behaviour,
    tag: &str,
) -> anyhow::Result<Observation> {
    let (stack, settings) = call(fixture, &behaviour.tag(tag))?;
    let batch = DaemonBatch::start(&set(settings, &SHORT_JOIN))?;
    let job = wait_for_job(stack, tag, "job")?;
    let reason = reason_by_listed_jobs(stack, job.room())?;
    Ok(batch.finish(stack)?.with_reason_by_jobs(reason))
}

fn no_agent_joins(stack: &Stack, agent: &str) -> anyhow::Result<Observation> {
    let settings = one_batch(Settings::new(stack)).set("agent_name", agent);
    DaemonBatch::start(&set(settings, &SHORT_JOIN))?.finish(stack)
}

fn no_worker(fixture: &Fixture) -> anyhow::Result<Observation> {
    no_agent_joins(fixture.own_stack(&[], &Behaviour::is_busy())?, AGENT)
}

fn busy_worker(fixture: &Fixture) -> anyhow::Result<Observation> {
    behaves(fixture, &Behaviour::is_busy(), &SHORT_JOIN)
}

fn wrong_agent_name(fixture: &Fixture) -> anyhow::Result<Observation> {
    no_agent_joins(call(fixture, &Behaviour::greets())?.0, "no-such-agent")
}

fn no_track(fixture: &Fixture) -> anyhow::Result<Observation> {
    behaves(
        fixture,
        &Behaviour::has_no_track(),
        &[("deadlines.track", "3s")],
    )
}

fn no_packets(fixture: &Fixture) -> anyhow::Result<Observation> {
    behaves(fixture, &Behaviour::sends_no_packets(), &[SHORT_SPEECH])
}

fn silence(fixture: &Fixture) -> anyhow::Result<Observation> {
    behaves(fixture, &Behaviour::is_silent(), &[SHORT_SPEECH])
}

const SHORT_SPEECH: (&str, &str) = ("deadlines.speech", "4s");

fn no_reply(fixture: &Fixture) -> anyhow::Result<Observation> {
    let (stack, settings) = call(fixture, &Behaviour::greets())?;
    let settings = settings
        .set("expect.reply", true)
        .set("deadlines.reply", "3s");
    DaemonBatch::start(&settings)?.finish(stack)
}

fn hangs_up(fixture: &Fixture) -> anyhow::Result<Observation> {
    behaves(fixture, &Behaviour::hangs_up(), &[("batch.hold", "15s")])
}

fn two_dispatches(fixture: &Fixture) -> anyhow::Result<Observation> {
    let call = greeted(fixture, "is-dispatched-twice")?;
    call.stack.api.dispatch(&call.room, AGENT, "")?;
    call.finish()
}

fn job_is_killed(fixture: &Fixture) -> anyhow::Result<Observation> {
    let call = greeted(fixture, "is-killed-in-the-matrix")?;
    kill(call.event("job")?.number("pid")?)?;
    call.finish()
}

fn spent_model(fixture: &Fixture) -> anyhow::Result<Observation> {
    let fault = "inference_error=inference_quota_exceeded";
    let behaviour = Behaviour::whose_model_fails("llm", "quota", fault);
    // Long enough for all attempts that a session makes by default.
    behaves(fixture, &behaviour, &[("deadlines.speech", "8s")])
}

// --- LiveKit ---

fn server_freezes(fixture: &Fixture) -> anyhow::Result<Observation> {
    let call = greeted_alone(fixture, "server-freezes")?;
    call.stack.server.signal(Signal::STOP)?;
    let seen = call.batch.verdict()?;
    call.stack.server.signal(Signal::CONT)?;
    call.batch.end(call.stack, &seen)?;
    Ok(seen)
}

fn server_is_killed(fixture: &Fixture) -> anyhow::Result<Observation> {
    let call = greeted_alone(fixture, "server-is-killed")?;
    call.stack.server.signal(Signal::KILL)?;
    call.finish()
}

/// The server handles the request when it runs again.
fn server_is_frozen_before(fixture: &Fixture) -> anyhow::Result<Observation> {
    let stack = fixture.own_stack(&[], &Behaviour::greets())?;
    stack.server.signal(Signal::STOP)?;
    let batch = DaemonBatch::start(&with_short_deadlines(one_batch(Settings::new(stack))))?;
    let seen = batch.verdict()?;
    stack.server.signal(Signal::CONT)?;
    batch.end(stack, &seen)?;
    Ok(seen)
}

fn metadata_is_too_long(fixture: &Fixture) -> anyhow::Result<Observation> {
    configured(fixture, "limit:\n  max_metadata_size: 4\n")
}

/// Another client deletes the room between its creation and our join. The server doesn't create rooms on a join.
fn gone_before_joining(fixture: &Fixture) -> anyhow::Result<Observation> {
    let stack = fixture.own_stack_with("room:\n  auto_create: false\n", &[])?;
    let gate = Gate::before(stack.address(), Hold::Signal)?;
    let settings = one_batch(Settings::new(stack)).project("url", format!("ws://{}", gate.address));
    let batch = DaemonBatch::start(&settings)?;
    let room = wait_for("the room", SHORT_TIMEOUT, || Ok(stack.api.rooms()?.pop()))?;
    stack.api.delete_room(&room)?;
    gate.open();
    batch.finish(stack)
}

fn no_audio_codec(fixture: &Fixture) -> anyhow::Result<Observation> {
    configured(fixture, "room:\n  enabled_codecs:\n    - mime: video/vp8\n")
}

/// Another call uses all tracks that the node allows.
fn full_node(fixture: &Fixture) -> anyhow::Result<Observation> {
    let agents = [Agent::named(AGENT)];
    let stack = fixture.own_stack_with("limit:\n  num_tracks: 2\n", &agents)?;
    let other = Settings::new(stack).set("batch.hold", "60s").once()?;
    wait_for("the node to be full", SHORT_TIMEOUT, || {
        let room = "test-for-full-node";
        if stack.api.create_room(room).is_err() {
            return Ok(Some(()));
        }
        stack.api.delete_room(room)?;
        Ok(None)
    })?;
    let seen = DaemonBatch::start(&with_short_deadlines(one_batch(Settings::new(stack))))?
        .finish(stack)?;
    other.signal(Signal::INT)?;
    other.finish()?;
    Ok(seen)
}

// --- the network ---

fn blocked_media(fixture: &Fixture) -> anyhow::Result<Observation> {
    let stack = fixture.stack_behind_veth(&[])?;
    stack.block_udp()?;
    stack.block_media_over_tcp()?;
    DaemonBatch::start(&with_short_deadlines(one_batch(Settings::new(stack))))?.finish(stack)
}

fn broken_media(fixture: &Fixture) -> anyhow::Result<Observation> {
    let tag = "media-breaks-in-the-matrix";
    let stack = fixture.stack_behind_veth(&[Agent::named(AGENT)])?;
    let settings = one_batch(Settings::new(stack).behaviour(&Behaviour::greets().tag(tag)));
    let call = Call::start(stack, settings.project("ice", "tcp"), tag)?;
    stack.reset_media_over_tcp()?;
    call.finish()
}

fn untrusted_certificate(fixture: &Fixture) -> anyhow::Result<Observation> {
    let (stack, settings) = call(fixture, &Behaviour::greets())?;
    let proxy = TlsProxy::start(stack, "localhost")?;
    let settings = settings.project("url", proxy.url.as_str());
    DaemonBatch::start(&with_short_deadlines(settings))?.finish(stack)
}

fn certificate_for_another_name(fixture: &Fixture) -> anyhow::Result<Observation> {
    let (stack, settings) = call(fixture, &Behaviour::greets())?;
    let proxy = TlsProxy::start(stack, "elsewhere.test")?;
    let settings = settings
        .project("url", proxy.url.as_str())
        .project("ca_file", proxy.ca_file.display().to_string());
    DaemonBatch::start(&with_short_deadlines(settings))?.finish(stack)
}

// --- another client ---

fn room_is_deleted(fixture: &Fixture) -> anyhow::Result<Observation> {
    let call = greeted(fixture, "room-is-deleted-in-the-matrix")?;
    call.stack.api.delete_room(&call.room)?;
    call.finish()
}

fn participant_is_removed(fixture: &Fixture) -> anyhow::Result<Observation> {
    let call = greeted(fixture, "caller-is-removed-in-the-matrix")?;
    let caller = call.event("caller")?;
    let identity = caller.text("caller");
    call.stack.api.remove_participant(&call.room, identity)?;
    call.finish()
}

fn agent_is_removed(fixture: &Fixture) -> anyhow::Result<Observation> {
    let call = greeted(fixture, "agent-is-removed")?;
    let participants = call.stack.api.participants(&call.room)?;
    let agent = participants.iter().find(|one| one["kind"] == "AGENT");
    let identity = agent.and_then(|agent| agent["identity"].as_str());
    let identity = identity.with_context(|| format!("no agent in {participants:?}"))?;
    call.stack.api.remove_participant(&call.room, identity)?;
    call.finish()
}

fn right_to_publish_is_revoked(fixture: &Fixture) -> anyhow::Result<Observation> {
    let call = greeted(fixture, "may-not-publish-in-the-matrix")?;
    let caller = call.event("caller")?;
    let identity = caller.text("caller");
    call.stack.api.revoke(&call.room, identity, "can_publish")?;
    call.finish()
}

fn identity_is_taken(fixture: &Fixture) -> anyhow::Result<Observation> {
    let call = greeted(fixture, "identity-is-taken")?;
    let caller = call.event("caller")?;
    take_identity(call.stack, &call.room, caller.text("caller"))?;
    call.finish()
}

// --- the settings, and the canary ---

fn wrong_secret(fixture: &Fixture) -> anyhow::Result<Observation> {
    let (stack, settings) = call(fixture, &Behaviour::greets())?;
    let wrong = SECRET.replace("hold", "know");
    let settings = settings.project("api_secret", wrong);
    DaemonBatch::start(&with_short_deadlines(settings))?.finish(stack)
}

fn wrong_path(fixture: &Fixture) -> anyhow::Result<Observation> {
    let (stack, settings) = call(fixture, &Behaviour::greets())?;
    let settings = settings.project("url", format!("{}/nowhere", stack.url));
    DaemonBatch::start(&with_short_deadlines(settings))?.finish(stack)
}

fn probe_panics(fixture: &Fixture) -> anyhow::Result<Observation> {
    let (stack, settings) = call(fixture, &Behaviour::greets())?;
    let fault = [("LIVEKIT_CANARY_FAULT", "panic:0")];
    DaemonBatch::start_with(&settings, NO_LINGER, &fault)?.finish(stack)
}
