use super::*;

fn rejection(status: u16, code: Option<&str>, message: &str) -> HttpRejection {
    HttpRejection {
        status,
        twirp_code: code.map(str::to_owned),
        message: message.to_owned(),
        retry_after: None,
    }
}

fn api(call: ProbeCall, status: u16, code: Option<&str>, message: &str) -> Failure {
    let error = ApiError::Refused(rejection(status, code, message));
    Failure::of_api(call, &error, &mut Evidence::default())
}

fn join(status: u16, message: &str) -> Failure {
    let error = SignalError::Refused(rejection(status, None, message));
    Failure::of_join(&error, &mut Evidence::default())
}

fn connect_errors() -> [ConnectError; 4] {
    let host = || "lk.example".to_owned();
    [
        ConnectError::Dns {
            host: host(),
            error: "no such host".to_owned(),
        },
        ConnectError::Tcp {
            address: "192.0.2.1:443".to_owned(),
            error: "connection refused".to_owned(),
        },
        ConnectError::Tls {
            host: host(),
            error: "invalid peer certificate: UnknownIssuer".to_owned(),
        },
        ConnectError::Shortage {
            host: host(),
            error: "Too many open files (os error 24)".to_owned(),
        },
    ]
}

#[test]
fn only_a_limit_that_the_service_names_is_a_plan_limit() {
    use LimitKind as L;
    let twirp = Some("resource_exhausted");
    let table = [
        (429, None, "slow down", Some(L::ApiRate)),
        (429, twirp, "rate limit exceeded", Some(L::ApiRate)),
        // A proxy may give Twirp's code another status.
        (503, twirp, "rate limit exceeded", Some(L::ApiRate)),
        (
            429,
            twirp,
            "Concurrent Agent Sessions reached",
            Some(L::AgentSessions),
        ),
        (429, twirp, "Monthly QUOTA exceeded", Some(L::Quota)),
        (429, twirp, "no participant minutes left", Some(L::Quota)),
        (
            503,
            None,
            "node has exceeded its configured limit",
            Some(L::Node),
        ),
        (
            500,
            Some("internal"),
            "reached configured limit for node",
            Some(L::Node),
        ),
        // Older Twirp servers gave the code another status, which does not point to a rate.
        (403, twirp, "no more rooms", Some(L::Other)),
        (503, None, "no healthy upstream", None),
        (500, Some("internal"), "quota of retries used up", None),
    ];
    for (status, code, message, kind) in table {
        let failure = api(ProbeCall::CreateRoom, status, code, message);
        let expected = kind.map_or(Reason::RoomCreateFailed, Reason::PlanLimit);
        assert_eq!(failure.reason, expected, "{status} {message}");
    }
    for (status, message, kind) in [
        (429, "too many connections", Some(L::Connections)),
        (503, "node has exceeded its configured limit", Some(L::Node)),
        (500, "reached configured limit for node", Some(L::Node)),
        (503, "no healthy upstream", None),
        (500, "connection closed by media", None),
    ] {
        let expected = kind.map_or(Reason::SignalFailed, Reason::PlanLimit);
        assert_eq!(join(status, message).reason, expected, "{status} {message}");
    }
}

#[test]
fn region_that_the_project_is_not_pinned_to_is_a_config_failure() {
    let answer = "project not allowed in this region.";
    for failure in [
        api(ProbeCall::CreateRoom, 451, None, answer),
        api(ProbeCall::CreateDispatch, 451, None, answer),
        join(403, answer),
    ] {
        assert_eq!(failure.reason, Reason::ConfigRejected);
        assert!(failure.detail.contains("pinned to a region"), "{failure:?}");
        assert!(!failure.detail.contains("api_key"), "{failure:?}");
    }
}

#[test]
fn rejections_that_a_setting_explains_are_config_failures() {
    for status in [401, 403] {
        assert_eq!(
            api(ProbeCall::CreateRoom, status, None, "no").reason,
            Reason::AuthRejected
        );
    }
    assert_eq!(join(401, "no").reason, Reason::AuthRejected);
    let not_found = Some("not_found");
    let table = [
        (
            api(ProbeCall::CreateRoom, 404, None, "404 page not found"),
            Reason::ConfigRejected,
        ),
        (
            api(ProbeCall::CreateRoom, 404, Some("bad_route"), "no handler"),
            Reason::ConfigRejected,
        ),
        (
            api(ProbeCall::CreateDispatch, 404, None, "404 page not found"),
            Reason::ConfigRejected,
        ),
        (
            api(
                ProbeCall::CreateDispatch,
                404,
                not_found,
                "requested room does not exist",
            ),
            Reason::DispatchFailed,
        ),
        (join(404, "404 page not found"), Reason::ConfigRejected),
        (
            join(404, "requested room does not exist"),
            Reason::SignalFailed,
        ),
    ];
    for (failure, reason) in table {
        assert_eq!(failure.reason, reason, "{}", failure.detail);
    }
}

#[test]
fn answer_of_another_server_is_a_config_failure() {
    for status in [200, 204, 301, 302, 307, 308] {
        for failure in [
            api(ProbeCall::CreateRoom, status, None, "<html>My site"),
            api(ProbeCall::CreateDispatch, status, None, "<html>My site"),
            join(status, "<html>My site"),
        ] {
            assert_eq!(failure.reason, Reason::ConfigRejected, "{status}");
            let redirect = failure.detail.contains("follows no redirect");
            assert_eq!(redirect, status >= 300, "{failure:?}");
        }
    }
}

#[test]
fn proxy_that_drops_the_upgrade_is_named() {
    for status in [404, 426] {
        let failure = join(status, "");
        assert_eq!(failure.reason, Reason::ConfigRejected, "{status}");
        assert!(failure.detail.contains("headers Upgrade"), "{failure:?}");
    }
}

#[test]
fn refused_token_leads_to_the_clock_the_proxy_or_the_key_pair() {
    let times = [
        "invalid token: [token], error: token has invalid claims: token is not valid yet",
        "invalid token: [token], error: token has invalid claims: token is expired",
        "error: go-jose/go-jose/jwt: validation failed, token not valid yet (nbf)",
        "error: go-jose/go-jose/jwt: validation field, token issued in the future (iat)",
    ];
    let clocks = times.map(|answer| (401, answer, "compare the clock"));
    let others = [
        (401, "invalid API key: [API key]", "api_key and api_secret"),
        (
            401,
            "<html>401 Authorization Required",
            "a proxy or a firewall",
        ),
        (403, "Forbidden", "a proxy or a firewall"),
    ];
    for (status, answer, check) in clocks.into_iter().chain(others) {
        let failure = api(ProbeCall::CreateRoom, status, None, answer);
        assert_eq!(failure.reason, Reason::AuthRejected);
        assert!(failure.detail.contains(check), "{failure:?}");
    }
    let denied = api(
        ProbeCall::CreateRoom,
        403,
        Some("permission_denied"),
        "permissions denied",
    );
    assert!(!denied.detail.contains("proxy"), "{denied:?}");
}

#[test]
fn rejection_is_recorded_as_evidence() {
    let mut evidence = Evidence::default();
    let error = ApiError::Refused(HttpRejection {
        retry_after: Some(Duration::from_millis(1500)),
        ..rejection(429, Some("resource_exhausted"), "slow\ndown")
    });
    let failure = Failure::of_api(ProbeCall::CreateDispatch, &error, &mut evidence);
    assert_eq!(evidence.step, Some("dispatch"));
    assert_eq!(evidence.http_status, Some(429));
    assert_eq!(evidence.twirp_code.as_deref(), Some("resource_exhausted"));
    assert_eq!(evidence.answer.as_deref(), Some("slow\ndown"));
    assert_eq!(evidence.retry_after_seconds, Some(1.5));
    assert!(failure.detail.contains("slow down"), "{}", failure.detail);
}

#[test]
fn long_answer_is_cut_in_the_detail() {
    let failure = join(500, &"ä".repeat(1000));
    assert!(failure.detail.chars().count() < 400, "{}", failure.detail);
}

#[test]
fn each_leave_reason_has_its_failure_reason() {
    let reasons = (0..=20)
        .filter_map(|number| DisconnectReason::try_from(number).ok())
        .map(|reason| reason.as_str_name())
        .chain(["A_REASON_OF_LATER_DAYS"])
        .map(|name| format!("{name}: {}", Failure::of_leave(name).reason.label()));
    insta::assert_snapshot!(reasons.collect::<Vec<_>>().join("\n"));
}

#[test]
fn details_state_what_happened_and_what_to_check() {
    let mut evidence = Evidence::default();
    let second = Duration::from_secs(1);
    let mut failures: Vec<_> = connect_errors()
        .into_iter()
        .map(|error| Failure::of_api(ProbeCall::CreateRoom, &error.into(), &mut evidence))
        .collect();
    failures.extend([
        api(ProbeCall::CreateRoom, 401, None, "invalid token"),
        api(ProbeCall::CreateRoom, 404, None, "404 page not found"),
        api(
            ProbeCall::CreateRoom,
            500,
            Some("internal"),
            "redis is down",
        ),
        api(
            ProbeCall::CreateDispatch,
            404,
            Some("not_found"),
            "requested room does not exist",
        ),
        api(
            ProbeCall::CreateDispatch,
            429,
            Some("resource_exhausted"),
            "slow down",
        ),
        api(
            ProbeCall::CreateDispatch,
            503,
            None,
            "node has exceeded its configured limit",
        ),
        Failure::of_api(
            ProbeCall::CreateDispatch,
            &ApiError::Timeout(second),
            &mut evidence,
        ),
        Failure::of_api(
            ProbeCall::CreateDispatch,
            &ApiError::Broken("reset by peer".to_owned()),
            &mut evidence,
        ),
        join(401, "invalid API key"),
        join(404, ""),
        join(429, "too many connections"),
        join(500, "connection closed by media"),
    ]);
    let joins = [
        SignalError::JoinTimeout(second),
        SignalError::Closed("reset by peer".to_owned()),
        SignalError::LeftBeforeJoin {
            reason: "JOIN_FAILURE".to_owned(),
        },
        SignalError::LeftBeforeJoin {
            reason: "ROOM_DELETED".to_owned(),
        },
        SignalError::LeftBeforeJoin {
            reason: "SERVER_SHUTDOWN".to_owned(),
        },
    ];
    failures.extend(joins.map(|error| Failure::of_join(&error, &mut evidence)));
    failures.push(Failure::of_lost_signal(
        &SignalError::PingTimeout(15 * second),
        &mut evidence,
    ));
    let leaves = ["ROOM_DELETED", "PARTICIPANT_REMOVED", "DUPLICATE_IDENTITY"];
    failures.extend(leaves.map(Failure::of_leave));
    failures.extend(["CONNECTION_TIMEOUT", "SERVER_SHUTDOWN"].map(Failure::of_leave));
    let lines = failures
        .iter()
        .map(|failure| format!("{}: {}", failure.reason.label(), failure.detail));
    insta::assert_snapshot!(lines.collect::<Vec<_>>().join("\n"));
}

#[test]
fn large_token_explains_a_refused_join_by_its_size() {
    let of = |status, bytes| {
        let error = SignalError::Refused(rejection(status, None, "too large"));
        let mut evidence = Evidence::default();
        let failure = Failure::of_join(&error, &mut evidence);
        failure.or_large_token(bytes, &evidence)
    };
    for status in [400, 413, 414, 431, 494] {
        let failure = of(status, 27_000);
        assert_eq!(failure.reason, Reason::ConfigRejected, "{status}");
        assert!(failure.detail.contains("27000 bytes"), "{failure:?}");
        assert_eq!(of(status, 700).reason, Reason::SignalFailed, "{status}");
    }
    // A proxy may also hide its own refusal.
    let hidden = of(502, 27_000);
    assert_eq!(hidden.reason, Reason::SignalFailed);
    assert!(hidden.detail.contains("27000 bytes"), "{hidden:?}");
    assert_eq!(of(401, 27_000).reason, Reason::AuthRejected);
}
