//! The rows of the fault matrix, and how each fault is made.

use anyhow::Context as _;
use livekit_canary::probe::{LimitKind, Origin, Reason};
use rustix::process::Signal;

use super::There::{Made, Not};
use super::{Culprit, Fault, Seen, Verdict, Watch};
use crate::agents::take_identity;
use crate::canary::Settings;
use crate::gate::{Gate, Hold};
use crate::home::{ENDING, SOON};
use crate::order::Order;
use crate::scenarios::{Ground, expected_of_nobody, wait_for_job};
use crate::stack::{AGENT, Agent, Event, Interceptor, SECRET, Site, TlsProxy, kill, wait_for};

const NO_PROCESS: &str = "its agent is no process of its own that could be killed";
const NO_NETWORK: &str = "it binds to 127.0.0.1 alone, where nothing lies between";
const NO_PERMISSIONS: &str = "it takes no right away";
const NO_SETTING: &str = "it has no such setting";
const NO_ANSWER: &str = "it answers in full or not at all";
const NO_LEAVE: &str = "it refuses the upgrade instead, and says no more than 500";
const OF_NODE: &str = "one node refuses CreateRoom already: full_node";
const LISTED: &str = "it lists a job that runs as luck has it: agent_that_never_connects";

macro_rules! faults {
    ($($name:ident: $verdict:expr, $origin:expr, $slis:literal, within $within:literal, $evidence:expr,
        sandbox $sandbox:expr, real $real:expr $(, mock $mock:expr)?;)*) => {
        pub static FAULTS: &[Fault] = &[
            $(Fault {
                name: stringify!($name),
                verdict: $verdict,
                culprit: $origin,
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

const fn failed(reason: Reason) -> Verdict {
    Verdict::Failed(reason)
}

const fn limit(kind: LimitKind) -> Verdict {
    Verdict::Failed(Reason::PlanLimit(kind))
}

const fn by(origin: Origin) -> Culprit {
    Culprit::Somebody(origin)
}

// The longest first, so that none of them is left alone at the end.
faults! {
    server_freezes: failed(Reason::SignalLost), by(Origin::Livekit), "...-", within 50,
        [r#""step":"signal""#, r#""deadline_seconds":15.0"#, "hangs"],
        sandbox Made(server_freezes), real Made(server_freezes);
    job_is_killed: failed(Reason::AgentLeftEarly), by(Origin::Agent), "-++-", within 55,
        [r#""step":"agent""#, "CONNECTION_TIMEOUT", "crash"],
        sandbox Not(NO_PROCESS), real Made(job_is_killed);
    full_node: limit(LimitKind::Node), by(Origin::Limit), "...-", within 10,
        [r#""step":"create_room""#, "reached configured limit for node", "raise limits on the server"],
        sandbox Not(NO_SETTING), real Made(full_node);
    blocked_media: failed(Reason::MediaFailed), by(Origin::Network), "...-", within 20,
        [r#""step":"media""#, r#""deadline_seconds":5.0"#, "check UDP and TCP", "LiveKit wants media at UDP "],
        sandbox Made(|ground| service(ground, "no_media")), real Made(blocked_media);
    broken_media: failed(Reason::MediaFailed), by(Origin::Network), "...-", within 40,
        [r#""step":"media""#, "check UDP and TCP", "LiveKit wants media at TCP "],
        sandbox Not(NO_NETWORK), real Made(broken_media);
    server_is_killed: failed(Reason::SignalLost), by(Origin::Livekit), "...-", within 30,
        [r#""step":"signal""#, "killed, restarted or hangs"],
        sandbox Made(server_is_killed), real Made(server_is_killed);

    // Nothing is wrong, or nothing that the agent isn't told to be.
    nothing: Verdict::Ok, Culprit::Nobody, "++++", within 60, [r#""step":null"#],
        sandbox Made(nothing), real Made(nothing);
    agent_comes_late: Verdict::Ok, Culprit::Nobody, "+--+", within 60, [r#""step":null"#],
        sandbox Made(agent_comes_late), real Made(agent_comes_late);
    daemon_is_stopped: Verdict::Aborted, Culprit::Nobody, "....", within 60, [r#""reason":null"#],
        sandbox Made(daemon_is_stopped), real Made(daemon_is_stopped);

    // The agent's.
    agent_that_never_joins: failed(Reason::AgentNoShow), by(Origin::Agent), "----", within 15,
        [r#""step":"agent_join""#, r#""deadline_seconds":4.0"#, "JS_RUNNING", "a worker accepted the job"],
        sandbox Made(never_joins), real Not(LISTED);
    agent_that_never_connects: failed(Reason::AgentNoShow), by(Origin::Agent), "----", within 20,
        [r#""step":"agent_join""#, r#""deadline_seconds":4.0"#, "for agent \\\"echo-tester\\\""],
        sandbox Made(never_connects), real Made(never_connects);
    agent_that_fails_before_it_connects: failed(Reason::AgentNoShow), by(Origin::Agent), "----", within 20,
        [r#""step":"agent_join""#, r#""deadline_seconds":4.0"#, "for agent \\\"echo-tester\\\""],
        sandbox Made(fails), real Made(fails);
    no_worker: failed(Reason::DispatchUnanswered), by(Origin::Undetermined), "----", within 15,
        [r#""step":"agent_join""#, r#""deadline_seconds":4.0"#, "no job", "check, in this order, that a worker registered"],
        sandbox Made(no_worker), real Made(no_worker);
    busy_worker: failed(Reason::DispatchUnanswered), by(Origin::Undetermined), "----", within 15,
        [r#""step":"agent_join""#, "no job", "below its load limit"],
        sandbox Made(busy_worker), real Made(busy_worker);
    wrong_agent_name: failed(Reason::DispatchUnanswered), by(Origin::Undetermined), "----", within 15,
        [r#""step":"agent_join""#, r#"exactly \"no-such-agent\""#],
        sandbox Made(wrong_agent_name), real Made(wrong_agent_name);
    agent_without_a_track: failed(Reason::AgentNoTrack), by(Origin::Agent), "-+--", within 20,
        [r#""step":"agent_track""#, r#""deadline_seconds":3.0"#, "(AGENT, agent name"],
        sandbox Made(no_track), real Made(no_track);
    agent_without_packets: failed(Reason::AgentSilent), by(Origin::Agent), "-+--", within 20,
        [r#""step":"agent_speech""#, r#""deadline_seconds":4.0"#, "no audio packet came on its track"],
        sandbox Made(no_packets), real Made(no_packets);
    agent_with_a_track_of_silence: failed(Reason::AgentSilent), by(Origin::Agent), "-+--", within 20,
        [r#""step":"agent_speech""#, r#""deadline_seconds":4.0"#, "audio packets, but no speech in them"],
        sandbox Made(silence), real Made(silence);
    agent_without_a_reply: failed(Reason::AgentNoReply), by(Origin::Agent), "-++-", within 40,
        [r#""step":"agent_reply""#, r#""deadline_seconds":3.0"#, "STT, LLM and turn detection"],
        sandbox Made(no_reply), real Made(no_reply);
    agent_that_hangs_up: failed(Reason::AgentLeftEarly), by(Origin::Agent), "-++-", within 40,
        [r#""step":"agent""#, "the agent left (", "while the room was still open"],
        sandbox Made(hangs_up), real Made(hangs_up);
    two_dispatches: failed(Reason::AgentDuplicate), by(Origin::Agent), "-++-", within 30,
        [r#""step":"agent""#, "a second agent of that name joined (agent-"],
        sandbox Made(two_dispatches), real Made(two_dispatches);

    // LiveKit's.
    create_room_is_refused: failed(Reason::RoomCreateFailed), by(Origin::Livekit), "...-", within 10,
        [r#""step":"create_room""#, r#""http_status":500"#, "CreateRoom was refused"],
        sandbox Made(|ground| service(ground, "create_room=500")),
        real Made(|ground| intercepted(ground, "http-request return status 500 if { path_end /CreateRoom }"));
    room_is_refused_by_a_setting: failed(Reason::RoomCreateFailed), by(Origin::Livekit), "...-", within 10,
        [r#""step":"create_room""#, r#""http_status":400"#, r#""twirp_code":"invalid_argument""#, "metadata"],
        sandbox Not(NO_SETTING), real Made(metadata_is_too_long);
    create_room_hangs: failed(Reason::RoomCreateFailed), by(Origin::Livekit), "...-", within 15,
        [r#""step":"create_room""#, r#""deadline_seconds":2.0"#, "no answer within 2s"],
        sandbox Made(|ground| service(ground, "create_room=hang")), real Made(server_is_frozen_before);
    create_room_breaks: failed(Reason::RoomCreateFailed), by(Origin::Livekit), "...-", within 10,
        [r#""step":"create_room""#, "CreateRoom failed"],
        sandbox Made(|ground| service(ground, "create_room=drop")), real Not(NO_ANSWER);
    create_room_floods: failed(Reason::RoomCreateFailed), by(Origin::Livekit), "...-", within 10,
        [r#""step":"create_room""#, "CreateRoom failed"],
        sandbox Made(|ground| service(ground, "create_room=flood")), real Not(NO_ANSWER);
    dispatch_is_refused: failed(Reason::DispatchFailed), by(Origin::Livekit), "...-", within 15,
        [r#""step":"dispatch""#, r#""http_status":500"#, "CreateDispatch was refused"],
        sandbox Made(|ground| service(ground, "create_dispatch=500")),
        real Made(|ground| intercepted(ground, "http-request return status 500 if { path_end /CreateDispatch }"));
    dispatch_hangs: failed(Reason::DispatchFailed), by(Origin::Livekit), "...-", within 15,
        [r#""step":"dispatch""#, r#""deadline_seconds":2.0"#, "no answer within 2s"],
        sandbox Made(|ground| service(ground, "create_dispatch=hang")),
        real Made(|ground| intercepted(ground, "http-request silent-drop if { path_end /CreateDispatch }"));
    upgrade_is_refused: failed(Reason::SignalFailed), by(Origin::Livekit), "...-", within 10,
        [r#""step":"signal""#, r#""http_status":500"#, "the signal connection was refused"],
        sandbox Made(|ground| service(ground, "upgrade=500")),
        real Made(|ground| intercepted(ground, "http-request return status 500 if { path_beg /rtc }")),
        mock |ground| mocked(ground, "validate_500");
    upgrade_hangs: failed(Reason::SignalFailed), by(Origin::Livekit), "...-", within 15,
        [r#""step":"signal""#, r#""deadline_seconds":3.0"#, "no join response within 3s"],
        sandbox Made(|ground| service(ground, "upgrade=hang")),
        real Made(|ground| intercepted(ground, "http-request silent-drop if { path_beg /rtc }"));
    room_is_gone_before_we_join: failed(Reason::SignalFailed), by(Origin::Livekit), "...-", within 10,
        [r#""step":"signal""#, r#""http_status":404"#, "room does not exist"],
        sandbox Not(NO_SETTING), real Made(gone_before_joining);
    no_join_response: failed(Reason::SignalFailed), by(Origin::Livekit), "...-", within 15,
        [r#""step":"signal""#, r#""deadline_seconds":3.0"#, "no join response within 3s"],
        sandbox Made(|ground| service(ground, "before_join=hang")), real Not(NO_ANSWER),
        mock |ground| mocked(ground, "no_first_message");
    closed_before_the_join_response: failed(Reason::SignalFailed), by(Origin::Livekit), "...-", within 10,
        [r#""step":"signal""#, "joining failed"],
        sandbox Made(|ground| service(ground, "before_join=drop")), real Not(NO_ANSWER),
        mock |ground| mocked(ground, "close_before_join");
    flood_before_the_join_response: failed(Reason::SignalFailed), by(Origin::Livekit), "...-", within 10,
        [r#""step":"signal""#, "joining failed"],
        sandbox Made(|ground| service(ground, "before_join=flood")), real Not(NO_ANSWER);
    leave_instead_of_the_join_response: failed(Reason::SignalFailed), by(Origin::Livekit), "...-", within 10,
        [r#""step":"signal""#, "Leave SERVER_SHUTDOWN", "before the join response"],
        sandbox Not("its Leave is that of a full room: full_room"), real Not(NO_LEAVE),
        mock |ground| mocked(ground, "leave_first_message");
    connection_drops: failed(Reason::SignalLost), by(Origin::Livekit), "...-", within 15,
        [r#""step":"signal""#, "killed, restarted or hangs"],
        sandbox Made(|ground| service(ground, "after_join=drop")), real Not(NO_ANSWER),
        mock |ground| mocked(ground, "drop_when_connected");
    connection_closes: failed(Reason::SignalLost), by(Origin::Livekit), "...-", within 15,
        [r#""step":"signal""#, "the signal connection closed: code 1011"],
        sandbox Not("it breaks the connection, and says nothing"), real Not(NO_ANSWER),
        mock |ground| mocked(ground, "close_when_connected");
    no_pong: failed(Reason::SignalLost), by(Origin::Livekit), "...-", within 15,
        [r#""step":"signal""#, r#""deadline_seconds":3.0"#],
        sandbox Not("its pings keep their usual time: server_freezes"), real Not("the same"),
        mock |ground| mocked(ground, "no_pong");
    server_shuts_down: failed(Reason::SignalLost), by(Origin::Livekit), "...-", within 15,
        ["Leave SERVER_SHUTDOWN", "restarted or drained"],
        sandbox Not("its Leave is that of a lost connection"), real Not("it drains, and says nothing while a call lasts"),
        mock |ground| mocked(ground, "leave_when_connected");
    flood_after_the_join_response: failed(Reason::SignalLost), by(Origin::Livekit), "...-", within 15,
        [r#""step":"signal""#],
        sandbox Made(|ground| service(ground, "after_join=flood")), real Not(NO_ANSWER);
    track_is_not_acknowledged: failed(Reason::PublishFailed), by(Origin::Livekit), "...-", within 20,
        [r#""step":"publish""#, r#""deadline_seconds":5.0"#, "did not acknowledge the echo track"],
        sandbox Made(|ground| service(ground, "after_join=hang")), real Not("audio_is_not_allowed"),
        mock |ground| mocked(ground, "happy");
    audio_is_not_allowed: failed(Reason::PublishFailed), by(Origin::Livekit), "...-", within 20,
        [r#""step":"publish""#, "the server's answer is not understood", "enabled_codecs"],
        sandbox Not(NO_SETTING), real Made(no_audio_codec);

    // The network's.
    closed_port: failed(Reason::Unreachable), by(Origin::Network), "...-", within 10,
        [r#""step":"create_room""#, "127.0.0.1:1", "check that LiveKit runs there"],
        sandbox Made(|ground| elsewhere(ground, "ws://127.0.0.1:1")),
        real Made(|ground| elsewhere(ground, "ws://127.0.0.1:1"));
    unknown_host: failed(Reason::Unreachable), by(Origin::Network), "...-", within 30,
        [r#""step":"create_room""#, "no-such-host.invalid", "resolver"],
        sandbox Made(|ground| elsewhere(ground, "ws://no-such-host.invalid:7880")),
        real Made(|ground| elsewhere(ground, "ws://no-such-host.invalid:7880"));
    untrusted_certificate: failed(Reason::Unreachable), by(Origin::Network), "...-", within 10,
        [r#""step":"create_room""#, "issuer is not trusted", "ca_file"],
        sandbox Made(untrusted_certificate), real Made(untrusted_certificate);
    certificate_for_another_name: failed(Reason::Unreachable), by(Origin::Network), "...-", within 10,
        [r#""step":"create_room""#, "elsewhere.test", "check the certificate, its host name"],
        sandbox Made(certificate_for_another_name), real Made(certificate_for_another_name);

    // Somebody else's.
    room_is_deleted: failed(Reason::Removed), by(Origin::External), "....", within 30,
        ["(ROOM_DELETED)", "who deletes rooms"],
        sandbox Made(room_is_deleted), real Made(room_is_deleted);
    participant_is_removed: failed(Reason::Removed), by(Origin::External), "....", within 30,
        ["Leave PARTICIPANT_REMOVED", "somebody removed the echo participant"],
        sandbox Made(participant_is_removed), real Made(participant_is_removed);
    agent_is_removed: failed(Reason::Removed), by(Origin::External), "....", within 30,
        ["somebody removed the agent (PARTICIPANT_REMOVED)"],
        sandbox Made(agent_is_removed), real Made(agent_is_removed);
    identity_is_taken: failed(Reason::Removed), by(Origin::External), "....", within 30,
        ["Leave DUPLICATE_IDENTITY", "took the echo participant's identity"],
        sandbox Made(identity_is_taken), real Made(identity_is_taken);

    right_to_publish_is_taken_away: failed(Reason::Removed), by(Origin::External), "....", within 30,
        [r#""step":"permission""#, "right to publish"],
        sandbox Not(NO_PERMISSIONS), real Made(may_not_publish);

    // The plan's. The real server has but one limit of these: a proxy says what LiveKit Cloud's would.
    too_many_connections: limit(LimitKind::Connections), by(Origin::Limit), "...-", within 10,
        [r#""step":"signal""#, r#""http_status":429"#, r#""retry_after_seconds":30.0"#, "retry after 30s"],
        sandbox Made(|ground| service(ground, "upgrade=429,retry_after=30s")),
        real Made(|ground| intercepted(ground, "http-request return status 429 hdr Retry-After 30 content-type text/plain \
            string \"too many connections\" if { path_beg /rtc }"));
    too_many_calls: limit(LimitKind::ApiRate), by(Origin::Limit), "...-", within 10,
        [r#""step":"create_room""#, r#""http_status":429"#, r#""twirp_code":"resource_exhausted""#, "no retry time was given"],
        sandbox Made(|ground| service(ground, "create_room=429")),
        real Made(|ground| intercepted(ground, "http-request return status 429 content-type application/json \
            string '{\"code\":\"resource_exhausted\",\"msg\":\"rate limit exceeded\"}' if { path_end /CreateRoom }"));
    too_many_calls_for_a_proxy: limit(LimitKind::ApiRate), by(Origin::Limit), "...-", within 10,
        [r#""step":"dispatch""#, r#""http_status":429"#, r#""twirp_code":null"#, "Too Many Requests"],
        sandbox Made(|ground| service(ground, "create_dispatch=429,html")),
        real Made(|ground| intercepted(ground, "http-request return status 429 content-type text/html \
            string '<html><h1>429 Too Many Requests</h1></html>' if { path_end /CreateDispatch }"));
    too_many_agent_sessions: limit(LimitKind::AgentSessions), by(Origin::Limit), "...-", within 10,
        [r#""step":"dispatch""#, r#""http_status":429"#, "agent session"],
        sandbox Made(|ground| service(ground, "create_dispatch=resource_exhausted")),
        real Made(|ground| intercepted(ground, "http-request return status 429 content-type application/json \
            string '{\"code\":\"resource_exhausted\",\"msg\":\"concurrent agent sessions limit reached\"}' \
            if { path_end /CreateDispatch }"));
    spent_quota: limit(LimitKind::Quota), by(Origin::Limit), "...-", within 10,
        [r#""step":"create_room""#, "minutes of the plan are used up"],
        sandbox Made(|ground| intercepted(ground, SPENT)), real Made(|ground| intercepted(ground, SPENT));
    full_node_of_a_cluster: limit(LimitKind::Node), by(Origin::Limit), "...-", within 10,
        [r#""step":"signal""#, r#""http_status":503"#, "the LiveKit node is full"],
        sandbox Made(|ground| service(ground, "upgrade=503")), real Not(OF_NODE);
    full_room: limit(LimitKind::Room), by(Origin::Limit), "...-", within 10,
        [r#""step":"signal""#, "Leave JOIN_FAILURE", "limits on participants and rooms"],
        sandbox Made(|ground| service(ground, "before_join=leave")), real Not(NO_LEAVE);
    spent_model: limit(LimitKind::Inference), by(Origin::Limit), "...-", within 20,
        ["the agent reported an error", "inference_quota_exceeded", "so agent_silent"],
        sandbox Made(spent_model), real Made(spent_model);
    limit_without_a_name: limit(LimitKind::Other), by(Origin::Limit), "...-", within 10,
        [r#""step":"create_room""#, r#""twirp_code":"resource_exhausted""#, "no more of these"],
        sandbox Made(|ground| service(ground, "create_room=unnamed")),
        real Made(|ground| intercepted(ground, "http-request return status 403 content-type application/json \
            string '{\"code\":\"resource_exhausted\",\"msg\":\"no more of these\"}' if { path_end /CreateRoom }"));

    // Of the settings.
    wrong_secret: failed(Reason::AuthRejected), by(Origin::Config), "....", within 10,
        [r#""step":"create_room""#, r#""http_status":401"#, "api_key and api_secret"],
        sandbox Made(wrong_secret), real Made(wrong_secret), mock wrong_secret;
    wrong_path: failed(Reason::ConfigRejected), by(Origin::Config), "....", within 10,
        [r#""step":"create_room""#, r#""http_status":404"#, "is the project's url right, its path included?"],
        sandbox Made(wrong_path), real Made(wrong_path), mock wrong_path;
    no_signal_endpoint: failed(Reason::ConfigRejected), by(Origin::Config), "....", within 10,
        [r#""step":"signal""#, r#""http_status":404"#, "no signal endpoint there"],
        sandbox Not("it has one"), real Not("the same"),
        mock |ground| mocked(ground, "validate_service_not_found");

    // Our own.
    probe_panics: failed(Reason::Internal), by(Origin::Canary), "....", within 40,
        ["the canary itself failed"],
        sandbox Made(probe_panics), real Made(probe_panics);
}

/// What a provider might say; the answers of LiveKit Cloud are unpublished.
const SPENT: &str = "http-request return status 429 content-type application/json \
    string '{\"code\":\"resource_exhausted\",\"msg\":\"the minutes of the plan are used up\"}' if { path_end /CreateRoom }";

// --- settings ---

/// A target that ticks for nobody: every batch is asked for.
fn asked(settings: Settings) -> Settings {
    settings
        .set("schedule.cron", "0 0 1 1 *")
        .set("batch.hold", "2s")
        .set("late_agent_window", "1s")
        .set("objectives.join_within", "15s")
        .set("objectives.first_speech_within", "20s")
        .set("deadlines.join", "20s")
        .set("deadlines.media", "15s")
}

/// A site whose agent does what `order` says, and settings that call it.
fn call<'a>(ground: &'a Ground, order: &Order) -> anyhow::Result<(&'a Site, Settings)> {
    let (site, settings) = ground.call(order)?;
    Ok((site, asked(settings)))
}

/// One room with such an agent and nothing else to it.
fn told(ground: &Ground, order: &Order, keys: &[(&str, &str)]) -> anyhow::Result<Seen> {
    let (site, settings) = call(ground, order)?;
    Watch::begin(&set(settings, keys))?.finish(site)
}

fn set(settings: Settings, keys: &[(&str, &str)]) -> Settings {
    let keys = keys.iter();
    keys.fold(settings, |settings, (key, value)| settings.set(key, *value))
}

/// Of what LiveKit, a limit or the network does, nothing takes long.
fn impatient(settings: Settings) -> Settings {
    settings
        .project("api_timeout", "2s")
        .set("deadlines.signal", "3s")
        .set("deadlines.media", "5s")
        .set("deadlines.cleanup", "3s")
}

/// A fault of the sandbox's server.
fn service(ground: &Ground, fault: &str) -> anyhow::Result<Seen> {
    let order = Order::greets().fault(fault);
    let (site, settings) = call(ground, &order)?;
    Watch::begin(&impatient(settings))?.finish(site)
}

/// A proxy before the site that answers by these rules of haproxy's.
fn intercepted(ground: &Ground, rules: &str) -> anyhow::Result<Seen> {
    let (site, settings) = call(ground, &Order::greets())?;
    let proxy = Interceptor::start(site, rules)?;
    let settings = impatient(settings).project("url", proxy.url.as_str());
    Watch::begin(&settings)?.finish(site)
}

/// What upstream's mock does when it is told `signal`.
fn mocked(ground: &Ground, signal: &str) -> anyhow::Result<Seen> {
    let site = ground.own_site(&[], &Order::greets())?;
    let control = serde_json::json!({ "signal": signal }).to_string();
    let settings = impatient(asked(Settings::new(site))).attribute("lk.mock", &control);
    Watch::begin(&settings)?.finish(site)
}

/// Another address than the site's.
fn elsewhere(ground: &Ground, url: &str) -> anyhow::Result<Seen> {
    let (site, settings) = call(ground, &Order::greets())?;
    Watch::begin(&impatient(settings).project("url", url))?.finish(site)
}

/// A livekit-server with these settings of its own, in YAML, and no agent.
fn configured(ground: &Ground, yaml: &str) -> anyhow::Result<Seen> {
    let site = ground.own_site_with(yaml, &[])?;
    Watch::begin(&impatient(asked(Settings::new(site))))?.finish(site)
}

/// A call in which the agent has greeted and stays, on a site that all share or that is the fault's own.
fn greeted<'a>(ground: &'a Ground, tag: &str) -> anyhow::Result<Call<'a>> {
    let (site, settings) = call(ground, &Order::greets().tag(tag))?;
    Call::begin(site, settings, tag)
}

/// The same on a site that the fault may harm; where the server is harmed, nothing is to wait for it long.
fn greeted_alone<'a>(ground: &'a Ground, tag: &str) -> anyhow::Result<Call<'a>> {
    let order = Order::greets().tag(tag);
    let site = ground.own_site(&[Agent::named(AGENT)], &order)?;
    let settings = asked(Settings::new(site).order(&order))
        .project("api_timeout", "2s")
        .set("deadlines.cleanup", "2s");
    Call::begin(site, settings, tag)
}

/// A call in which the agent has greeted.
struct Call<'a> {
    site: &'a Site,
    tag: String,
    room: String,
    watch: Watch,
}

impl<'a> Call<'a> {
    fn begin(site: &'a Site, settings: Settings, tag: &str) -> anyhow::Result<Self> {
        let watch = Watch::begin(&settings.set("batch.hold", "1m"))?;
        let greeted = wait_for_job(site, tag, "greeted")?;
        Ok(Self {
            site,
            tag: tag.to_owned(),
            room: greeted.room().to_owned(),
            watch,
        })
    }

    /// What the agent reports, once it has.
    fn event(&self, name: &str) -> anyhow::Result<Event> {
        wait_for_job(self.site, &self.tag, name)
    }

    fn finish(self) -> anyhow::Result<Seen> {
        self.watch.finish(self.site)
    }
}

// --- nothing ---

fn nothing(ground: &Ground) -> anyhow::Result<Seen> {
    told(ground, &Order::greets(), &[])
}

fn agent_comes_late(ground: &Ground) -> anyhow::Result<Seen> {
    let late = [
        ("objectives.join_within", "1s"),
        ("objectives.first_speech_within", "2s"),
    ];
    told(ground, &Order::greets().after(2), &late)
}

fn daemon_is_stopped(ground: &Ground) -> anyhow::Result<Seen> {
    let tag = "daemon-is-stopped";
    let (site, settings) = call(ground, &Order::greets().tag(tag))?;
    let settings = settings.set("batch.hold", "40s");
    let ending = "lifetime.drain_grace = \"100ms\"\nlifetime.shutdown_linger = \"5s\"";
    let watch = Watch::begin_with(&settings, ending, &[])?;
    wait_for_job(site, tag, "greeted")?;
    watch.stop(site)
}

// --- the agent ---

/// Where nobody comes, it is to be told soon.
const NOBODY: [(&str, &str); 2] = [("deadlines.join", "4s"), ("objectives.join_within", "3s")];

fn never_joins(ground: &Ground) -> anyhow::Result<Seen> {
    told(ground, &Order::never_connects(), &NOBODY)
}

fn never_connects(ground: &Ground) -> anyhow::Result<Seen> {
    listed_or_not(
        ground,
        Order::never_connects(),
        "never-connects-in-the-matrix",
    )
}

fn fails(ground: &Ground) -> anyhow::Result<Seen> {
    listed_or_not(ground, Order::fails(), "fails-in-the-matrix")
}

/// An agent that took its job and isn't coming; whether the job is listed is for the server to say.
fn listed_or_not(ground: &Ground, order: Order, tag: &str) -> anyhow::Result<Seen> {
    let (site, settings) = call(ground, &order.tag(tag))?;
    let watch = Watch::begin(&set(settings, &NOBODY))?;
    let job = wait_for_job(site, tag, "job")?;
    let wanted = expected_of_nobody(site, job.room())?;
    Ok(watch.finish(site)?.wanted(wanted))
}

fn nobody_comes(site: &Site, agent: &str) -> anyhow::Result<Seen> {
    let settings = asked(Settings::new(site)).set("agent_name", agent);
    Watch::begin(&set(settings, &NOBODY))?.finish(site)
}

fn no_worker(ground: &Ground) -> anyhow::Result<Seen> {
    nobody_comes(ground.own_site(&[], &Order::is_busy())?, AGENT)
}

fn busy_worker(ground: &Ground) -> anyhow::Result<Seen> {
    told(ground, &Order::is_busy(), &NOBODY)
}

fn wrong_agent_name(ground: &Ground) -> anyhow::Result<Seen> {
    nobody_comes(call(ground, &Order::greets())?.0, "no-such-agent")
}

fn no_track(ground: &Ground) -> anyhow::Result<Seen> {
    told(ground, &Order::has_no_track(), &[("deadlines.track", "3s")])
}

fn no_packets(ground: &Ground) -> anyhow::Result<Seen> {
    told(ground, &Order::sends_no_packets(), &[SPEECH])
}

fn silence(ground: &Ground) -> anyhow::Result<Seen> {
    told(ground, &Order::is_silent(), &[SPEECH])
}

const SPEECH: (&str, &str) = ("deadlines.speech", "4s");

fn no_reply(ground: &Ground) -> anyhow::Result<Seen> {
    let (site, settings) = call(ground, &Order::greets())?;
    let settings = settings
        .set("expect.reply", true)
        .set("deadlines.reply", "3s");
    Watch::begin(&settings)?.finish(site)
}

fn hangs_up(ground: &Ground) -> anyhow::Result<Seen> {
    told(ground, &Order::hangs_up(), &[("batch.hold", "15s")])
}

fn two_dispatches(ground: &Ground) -> anyhow::Result<Seen> {
    let call = greeted(ground, "is-dispatched-twice")?;
    call.site.api.dispatch(&call.room, AGENT, "")?;
    call.finish()
}

fn job_is_killed(ground: &Ground) -> anyhow::Result<Seen> {
    let call = greeted(ground, "is-killed-in-the-matrix")?;
    kill(call.event("job")?.number("pid")?)?;
    call.finish()
}

fn spent_model(ground: &Ground) -> anyhow::Result<Seen> {
    let fault = "inference_error=inference_quota_exceeded";
    let order = Order::whose_model_fails("llm", "quota", fault);
    // For every attempt that a session makes by its defaults.
    told(ground, &order, &[("deadlines.speech", "8s")])
}

// --- LiveKit ---

fn server_freezes(ground: &Ground) -> anyhow::Result<Seen> {
    let call = greeted_alone(ground, "server-freezes")?;
    call.site.server.signal(Signal::STOP)?;
    let seen = call.watch.verdict()?;
    call.site.server.signal(Signal::CONT)?;
    call.watch.end(call.site, &seen)?;
    Ok(seen)
}

fn server_is_killed(ground: &Ground) -> anyhow::Result<Seen> {
    let call = greeted_alone(ground, "server-is-killed")?;
    call.site.server.signal(Signal::KILL)?;
    call.finish()
}

/// What it was asked meanwhile it does when it thaws.
fn server_is_frozen_before(ground: &Ground) -> anyhow::Result<Seen> {
    let site = ground.own_site(&[], &Order::greets())?;
    site.server.signal(Signal::STOP)?;
    let watch = Watch::begin(&impatient(asked(Settings::new(site))))?;
    let seen = watch.verdict()?;
    site.server.signal(Signal::CONT)?;
    watch.end(site, &seen)?;
    Ok(seen)
}

fn metadata_is_too_long(ground: &Ground) -> anyhow::Result<Seen> {
    configured(ground, "limit:\n  max_metadata_size: 4\n")
}

/// Somebody deletes the room between its creation and our joining, on a server that creates none by itself.
fn gone_before_joining(ground: &Ground) -> anyhow::Result<Seen> {
    let site = ground.own_site_with("room:\n  auto_create: false\n", &[])?;
    let gate = Gate::before(site.address(), Hold::Signal)?;
    let settings = asked(Settings::new(site)).project("url", format!("ws://{}", gate.address));
    let watch = Watch::begin(&settings)?;
    let room = wait_for("the room", SOON, || Ok(site.api.rooms()?.pop()))?;
    site.api.delete_room(&room)?;
    gate.open();
    watch.finish(site)
}

fn no_audio_codec(ground: &Ground) -> anyhow::Result<Seen> {
    configured(ground, "room:\n  enabled_codecs:\n    - mime: video/vp8\n")
}

/// Another call takes all the tracks that the node may have.
fn full_node(ground: &Ground) -> anyhow::Result<Seen> {
    let agents = [Agent::named(AGENT)];
    let site = ground.own_site_with("limit:\n  num_tracks: 2\n", &agents)?;
    let other = Settings::new(site).set("batch.hold", "60s").once()?;
    wait_for("the node to be full", SOON, || {
        let room = "is-it-full";
        if site.api.create_room(room).is_err() {
            return Ok(Some(()));
        }
        site.api.delete_room(room)?;
        Ok(None)
    })?;
    let seen = Watch::begin(&impatient(asked(Settings::new(site))))?.finish(site)?;
    other.signal(Signal::INT)?;
    other.finish()?;
    Ok(seen)
}

// --- the network ---

fn blocked_media(ground: &Ground) -> anyhow::Result<Seen> {
    let site = ground.site_behind_veth(&[])?;
    site.block_udp()?;
    site.block_media_over_tcp()?;
    Watch::begin(&impatient(asked(Settings::new(site))))?.finish(site)
}

fn broken_media(ground: &Ground) -> anyhow::Result<Seen> {
    let tag = "media-breaks-in-the-matrix";
    let site = ground.site_behind_veth(&[Agent::named(AGENT)])?;
    let settings = asked(Settings::new(site).order(&Order::greets().tag(tag)));
    let call = Call::begin(site, settings.project("ice", "tcp"), tag)?;
    site.reset_media_over_tcp()?;
    call.finish()
}

fn untrusted_certificate(ground: &Ground) -> anyhow::Result<Seen> {
    let (site, settings) = call(ground, &Order::greets())?;
    let proxy = TlsProxy::start(site, "localhost")?;
    let settings = settings.project("url", proxy.url.as_str());
    Watch::begin(&impatient(settings))?.finish(site)
}

fn certificate_for_another_name(ground: &Ground) -> anyhow::Result<Seen> {
    let (site, settings) = call(ground, &Order::greets())?;
    let proxy = TlsProxy::start(site, "elsewhere.test")?;
    let settings = settings
        .project("url", proxy.url.as_str())
        .project("ca_file", proxy.ca_file.display().to_string());
    Watch::begin(&impatient(settings))?.finish(site)
}

// --- somebody else ---

fn room_is_deleted(ground: &Ground) -> anyhow::Result<Seen> {
    let call = greeted(ground, "room-is-deleted-in-the-matrix")?;
    call.site.api.delete_room(&call.room)?;
    call.finish()
}

fn participant_is_removed(ground: &Ground) -> anyhow::Result<Seen> {
    let call = greeted(ground, "caller-is-removed-in-the-matrix")?;
    let caller = call.event("caller")?;
    let identity = caller.text("caller");
    call.site.api.remove_participant(&call.room, identity)?;
    call.finish()
}

fn agent_is_removed(ground: &Ground) -> anyhow::Result<Seen> {
    let call = greeted(ground, "agent-is-removed")?;
    let there = call.site.api.participants(&call.room)?;
    let agent = there.iter().find(|one| one["kind"] == "AGENT");
    let identity = agent.and_then(|agent| agent["identity"].as_str());
    let identity = identity.with_context(|| format!("no agent in {there:?}"))?;
    call.site.api.remove_participant(&call.room, identity)?;
    call.finish()
}

fn may_not_publish(ground: &Ground) -> anyhow::Result<Seen> {
    let call = greeted(ground, "may-not-publish-in-the-matrix")?;
    let caller = call.event("caller")?;
    let identity = caller.text("caller");
    call.site.api.revoke(&call.room, identity, "can_publish")?;
    call.finish()
}

fn identity_is_taken(ground: &Ground) -> anyhow::Result<Seen> {
    let call = greeted(ground, "identity-is-taken")?;
    let caller = call.event("caller")?;
    take_identity(call.site, &call.room, caller.text("caller"))?;
    call.finish()
}

// --- the settings, and we ---

fn wrong_secret(ground: &Ground) -> anyhow::Result<Seen> {
    let (site, settings) = call(ground, &Order::greets())?;
    let wrong = SECRET.replace("hold", "know");
    let settings = settings.project("api_secret", wrong);
    Watch::begin(&impatient(settings))?.finish(site)
}

fn wrong_path(ground: &Ground) -> anyhow::Result<Seen> {
    let (site, settings) = call(ground, &Order::greets())?;
    let settings = settings.project("url", format!("{}/nowhere", site.url));
    Watch::begin(&impatient(settings))?.finish(site)
}

fn probe_panics(ground: &Ground) -> anyhow::Result<Seen> {
    let (site, settings) = call(ground, &Order::greets())?;
    let fault = [("LIVEKIT_CANARY_FAULT", "panic:0")];
    Watch::begin_with(&settings, ENDING, &fault)?.finish(site)
}
