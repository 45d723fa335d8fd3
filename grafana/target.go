package main

import (
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/units"
)

// One target in depth.
func target() (dashboard.Dashboard, error) {
	board := begin(targetUid, "LiveKit canary: one target", "Where the time of a call's beginning goes, and what fails.").
		Link(dashboard.NewDashboardLinkBuilder("All targets").
			Type(dashboard.DashboardLinkTypeLink).
			Icon("dashboard").
			Tooltip("The overview").
			Url("/d/" + overviewUid).
			KeepTime(true)).
		WithVariable(datasourceVariable())
	for _, variable := range targetVariables(false) {
		board.WithVariable(variable)
	}
	for _, variable := range windowVariables() {
		board.WithVariable(variable)
	}
	board.WithVariable(filterVariable()).WithVariable(statusPageVariable())

	targetNow(board)
	targetJoin(board)
	targetSpeech(board)
	targetWayIn(board)
	targetPlan(board)
	targetBatches(board)
	return board.Build()
}

func targetNow(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Now")).
		WithPanel(number(about{
			"Last batch", "The share of the rooms of the last batch that were ok.", share, 4, 4,
		}, query{known(latest("last_batch_success_ratio", "")), "ok"}).
			Decimals(0).
			Thresholds(steps("red", 0.01, "orange", 1.0, "green"))).
		WithPanel(number(about{
			"Since the last batch", "How long ago the last batch ended; kept over a restart.", units.Seconds, 4, 4,
		}, query{ago("last_batch_completed_timestamp_seconds"), "ago"}).Decimals(0)).
		WithPanel(number(about{
			"Next batch in", "Below zero: overdue, and the canary is stuck, stopped or not scraped.", units.Seconds, 4, 4,
		}, query{until("next_batch_timestamp_seconds"), "in"}).
			Decimals(0).
			Thresholds(steps("red", 0.0, "text"))).
		WithPanel(number(about{
			"Schedule", "Whether the schedule runs or was paused by hand.", units.Short, 4, 4,
		}, query{latest("target_paused", ""), "state"}).Mappings(words("runs", "paused", false))).
		WithPanel(batchesInWindow(4, 4, "batches")).
		WithPanel(number(about{
			"Open rooms", "Rooms that are open now.", count, 4, 4,
		}, query{latest("rooms_in_flight", ""), "rooms"}).Decimals(0)).
		WithPanel(rows(about{
			"Service levels over the SLO window",
			"As in the overview: the share of rooms that were good, of those that count; the objective; what is left of the " +
				"error budget; the longest delay that is good; how many rooms that rests on; and in how many batches one was bad.",
			count, 14, 7,
		}, []string{"sli"},
			levels(column{query{latest("slo_threshold_seconds", ""), "Within"}, units.Seconds, nil})...)).
		WithPanel(rows(about{
			"Settings",
			"What is watched, and how the agent is called. drill: true, it is a fire drill and says nothing about callers.",
			count, 10, 7,
		}, []string{"project", "url", "agent_name", "dispatch", "drill"},
			column{query: query{expr: latest("target_info", "")}, unit: count}))
}

func targetJoin(board *dashboard.DashboardBuilder) {
	const delay = "agent_join_delay_seconds"
	board.WithRow(dashboard.NewRowBuilder("Is it the agent? Its join")).
		WithPanel(lines(about{
			"Join delay of the rooms that an agent joined, last $window",
			"From the dispatch to the agent's join. It covers joined rooms only: where agents stay away it has nothing to say, " +
				"and may even look better. The panel beside it counts those too. slowest: the upper bound of its bucket. " +
				"Dashed: the threshold of the join objective.",
			units.Seconds, 12, 8,
		}, append(quantiles(delay, "", "position"),
			slowest(delay, "", "position"),
			query{latest("slo_threshold_seconds", `sli="join"`), "threshold"})...)).
		WithPanel(lines(about{
			"Service levels, last $window",
			"The share of rooms that were good, of those that count, rooms without an agent included. Dashed: the objective " +
				"of the join.",
			share, 12, 8,
		},
			query{serviceLevel("", "$window"), "{{sli}}"},
			query{latest("slo_objective_ratio", `sli="join"`), "join objective"},
		).Max(1)).
		WithPanel(heatOf(about{
			"Join delays, last $window",
			"How many rooms had which join delay, in the window before each column. Joined rooms only.",
			units.Seconds, 12, 8,
		}, delay)).
		WithPanel(lines(about{
			"First room of a batch and later ones: join delay, last $window",
			"A first room that takes longer than later ones meets a cold start: no idle process, or a worker scaled to zero. " +
				"Joined rooms only.",
			units.Seconds, 12, 8,
		},
			query{quantile("0.5", delay, ""), "{{position}} p50"},
			query{quantile("0.9", delay, ""), "{{position}} p90"},
		)).
		WithPanel(counts(about{
			"Rooms that the agent failed, last $window",
			"By reason, of origin agent or undetermined. Dotted: all rooms that came to an end.",
			count, 24, 7,
		}, probes(), failures(`origin=~"agent|undetermined"`, "{{reason}}")))
}

func targetSpeech(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it the agent? Its speech")).
		WithPanel(lines(about{
			"First speech, last $window",
			"From the dispatch to the agent's first speech: what a caller waits before hearing anything. Rooms in which it " +
				"spoke only. Dashed: the threshold of the first_speech objective.",
			units.Seconds, 8, 8,
		}, append(quantiles("first_speech_delay_seconds", ""),
			slowest("first_speech_delay_seconds", ""),
			query{latest("slo_threshold_seconds", `sli="first_speech"`), "threshold"})...)).
		WithPanel(lines(about{
			"Reply, last $window",
			"From the end of the echo to the agent's reply: a turn of speech recognition, model and speech. Turns that were " +
				"answered only, and none where the canary echoes nothing.",
			units.Seconds, 8, 8,
		}, append(quantiles("reply_delay_seconds", ""), slowest("reply_delay_seconds", ""))...)).
		WithPanel(lines(about{
			"The agent's start-up, p50 and p90, last $window",
			"agent_track: from its join to its audio track. first_audio: from the dispatch to its first packet. Where the join " +
				"is fast and these are slow, the agent's session starts slowly.",
			units.Seconds, 8, 8,
		},
			query{quantile("0.5", "span_duration_seconds", `span=~"agent_track|first_audio"`), "{{span}} p50"},
			query{quantile("0.9", "span_duration_seconds", `span=~"agent_track|first_audio"`), "{{span}} p90"},
		))
}

func targetWayIn(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it LiveKit or the network?")).
		WithPanel(lines(about{
			"The canary's own way in, p50, last $window",
			"Creating the room, the signal connection, media (DNS, ICE and DTLS included), publishing the echo track, and the " +
				"dispatch call. What is slow here is slow for callers too, and no fault of the agent's.",
			units.Seconds, 12, 8,
		}, query{quantile("0.5", "span_duration_seconds", wayIn), "{{span}}"})).
		WithPanel(lines(about{
			"The canary's own way in, p90, last $window",
			"The same for the slowest tenth.",
			units.Seconds, 12, 8,
		}, query{quantile("0.9", "span_duration_seconds", wayIn), "{{span}}"})).
		WithPanel(counts(about{
			"Rooms that others failed, last $window",
			"By origin and reason, the agent's own apart. Dotted: all rooms that came to an end.",
			count, 8, 8,
		}, probes(), failures(`origin!~"agent|undetermined"`, "{{origin}}: {{reason}}"))).
		WithPanel(lines(about{
			"Lost packets of the agent's audio, last $window",
			"The share of RTP packets of the agent's audio that never arrived at the canary. Speech suffers from some 3 % on.",
			share, 8, 8,
		}, query{sum(growth("agent_audio_packets_lost_total", "", "$window")) +
			"\n/ (" + sum(growth("agent_audio_packets_lost_total", "", "$window")) +
			" + " + sum(growth("agent_audio_packets_total", "", "$window")) + " > 0)", "lost"}).Max(1).AxisSoftMax(0.05)).
		WithPanel(lines(about{
			"Jitter of the agent's audio, last $window",
			"Interarrival jitter at the end of each room. Some milliseconds are usual; speech breaks up from some 30 ms on.",
			units.Seconds, 8, 8,
		}, quantiles("agent_audio_jitter_seconds", "")...))
}

func targetPlan(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it the plan?")).
		WithPanel(counts(about{
			"Rooms that met a plan limit, last $window",
			"By the limit that the service named. Dotted: all rooms that came to an end.",
			count, 8, 7,
		}, probes(), rejections("{{limit}}"))).
		WithPanel(counts(about{
			"Batches that did not open, last $window",
			"By cause: overlap, budget, backoff, paused. Dotted: batches that ended.",
			count, 8, 7,
		}, batches(), skipped("{{cause}}"))).
		WithPanel(lines(about{
			"Agent time, last $window",
			"As LiveKit bills it: whole minutes a session, from the agent's join to the room's end. It counts against the " +
				"project's agent budget.",
			units.Seconds, 8, 7,
		}, query{sum(growth("agent_billed_seconds_total", "", "$window")), "billed"}))
}

func targetBatches(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it the canary? Its batches")).
		WithPanel(counts(about{
			"Batches by result, last $window",
			"ok: every room that opened; degraded: some; failed: none; limited: a plan limit was met; aborted: the canary was " +
				"stopped. Dotted: all of them.",
			count, 8, 7,
		}, batches(), query{sum(growth("batches_total", "", "$window")), "{{result}}"})).
		WithPanel(lines(about{
			"Rooms, last $window",
			"Rooms that came to an end, and rooms that were aborted because the canary was stopped; these count nowhere else.",
			count, 8, 7,
		},
			query{sum(growth("probes_total", "", "$window")), "ended"},
			query{sum(growth("probes_aborted_total", "", "$window")), "aborted"},
		)).
		WithPanel(lines(about{
			"Rooms left behind, last $window",
			"leaked: could not be deleted, or may have come back with a late agent. swept: rooms of an earlier run, deleted " +
				"at the start.",
			count, 8, 7,
		},
			query{sum(growth("rooms_leaked_total", "", "$window")), "leaked"},
			query{sum(growth("rooms_swept_total", "", "$window")), "swept"},
		))
}
