package main

import (
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/units"
)

// The details of one target.
func target() (dashboard.Dashboard, error) {
	board := begin(targetUid, "LiveKit canary: one target", "How long each step at the start of a call takes, and what fails.").
		Link(dashboard.NewDashboardLinkBuilder("All targets").
			Type(dashboard.DashboardLinkTypeLink).
			Icon("dashboard").
			Tooltip("The overview of all targets").
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
	targetSteps(board)
	targetPlan(board)
	targetBatches(board)
	return board.Build()
}

func targetNow(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Now")).
		WithPanel(number(about{
			"Last batch", "The share of ok rooms in the last batch.", share, 4, 4,
		}, query{known(latest("last_batch_success_ratio", "")), "ok"}).
			Decimals(0).
			Thresholds(steps("red", 0.01, "orange", 1.0, "green"))).
		WithPanel(number(about{
			"Since the last batch", "Time since the last batch ended. The value survives a restart.", units.Seconds, 4, 4,
		}, query{ago("last_batch_completed_timestamp_seconds"), "ago"}).Decimals(0)).
		WithPanel(number(about{
			"Next batch in", "A negative value is overdue: the canary is stuck, stopped or not scraped.", units.Seconds, 4, 4,
		}, query{until("next_batch_timestamp_seconds"), "in"}).
			Decimals(0).
			Thresholds(steps("red", 0.0, "text"))).
		WithPanel(number(about{
			"Schedule", "Whether the schedule runs or is paused by hand.", units.Short, 4, 4,
		}, query{latest("target_paused", ""), "state"}).Mappings(words("runs", "paused", false))).
		WithPanel(batchesInWindow(4, 4, "batches")).
		WithPanel(number(about{
			"Open rooms", "The number of open rooms.", count, 4, 4,
		}, query{latest("rooms_in_flight", ""), "rooms"}).Decimals(0)).
		WithPanel(states(about{
			"Result of the last batch",
			"The rooms of the last batch at each time: all ok, some ok (degraded), or none ok (failed). An aborted batch changes " +
				"nothing.",
			share, 24, 4,
		}, query{known(latest("last_batch_success_ratio", "")), "{{target}}"})).
		WithPanel(rows(about{
			"Service levels over the SLO window",
			"As in the overview. Within: the longest delay that counts as good. Rooms: the number of eligible rooms. Bad batches: " +
				"the number of batches with a bad room.",
			count, 14, 7,
		}, []string{"sli"},
			levels(column{query{latest("slo_threshold_seconds", ""), "Within"}, units.Seconds, nil})...)).
		WithPanel(rows(about{
			"Settings",
			"The project, the agent and how it is dispatched. If drill is true, this is a fire drill and says nothing about callers.",
			count, 10, 7,
		}, []string{"project", "url", "agent_name", "dispatch", "drill"},
			column{query: query{expr: latest("target_info", "")}, unit: count}))
}

func targetJoin(board *dashboard.DashboardBuilder) {
	const delay = "agent_join_delay_seconds"
	board.WithRow(dashboard.NewRowBuilder("Is it the agent? Its join")).
		WithPanel(lines(about{
			"Join delay of the rooms that an agent joined, last $window",
			"Time from the dispatch to the agent's join, in rooms that an agent joined. Rooms without an agent are missing here, " +
				"so an outage can look like an improvement; the next panel includes them. slowest: the upper bound of the slowest " +
				"room's bucket. Dashed: the threshold of the join objective, and the p90 of the day before.",
			units.Seconds, 12, 8,
		}, append(quantiles(delay, "", "position"),
			yesterday(delay, "position"),
			slowest(delay, "", "position"),
			query{latest("slo_threshold_seconds", `sli="join"`), "threshold"})...)).
		WithPanel(lines(about{
			"Service levels, last $window",
			"The share of eligible rooms that were good. Rooms without an agent are included. Dashed: the objective of the join.",
			share, 12, 8,
		},
			query{serviceLevel("", "$window"), "{{sli}}"},
			query{latest("slo_objective_ratio", `sli="join"`), "join objective"},
		).Max(1)).
		WithPanel(heatOf(about{
			"Join delays, last $window",
			"Distribution of the join delays in the window before each column. Only rooms that an agent joined.",
			units.Seconds, 12, 8,
		}, delay)).
		WithPanel(lines(about{
			"First room of a batch and later ones: join delay, last $window",
			"If the first room takes longer than later ones, the agent has a cold start: no idle process, or a worker that was " +
				"scaled to zero. Only rooms that an agent joined.",
			units.Seconds, 12, 8,
		},
			query{quantile("0.5", delay, ""), "{{position}} p50"},
			query{quantile("0.9", delay, ""), "{{position}} p90"},
		)).
		WithPanel(counts(about{
			"Rooms that the agent failed, last $window",
			"Failed rooms by reason, with origin agent or undetermined. Dotted: all rooms that ended.",
			count, 24, 7,
		}, probes(), failures(`origin=~"agent|undetermined"`, "{{reason}}")))
}

func targetSpeech(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it the agent? Its speech")).
		WithPanel(lines(about{
			"First speech, last $window",
			"Time from the dispatch to the agent's first speech, which is how long a caller waits in silence. Only rooms in which " +
				"the agent spoke. Dashed: the threshold of the first_speech objective, and the p90 of the day before.",
			units.Seconds, 8, 8,
		}, append(quantiles("first_speech_delay_seconds", ""),
			yesterday("first_speech_delay_seconds"),
			slowest("first_speech_delay_seconds", ""),
			query{latest("slo_threshold_seconds", `sli="first_speech"`), "threshold"})...)).
		WithPanel(lines(about{
			"Reply, last $window",
			"Time from the end of the echo to the agent's reply: one turn of STT, LLM and TTS. Only turns with a reply. Empty if " +
				"the canary echoes nothing.",
			units.Seconds, 8, 8,
		}, append(quantiles("reply_delay_seconds", ""), slowest("reply_delay_seconds", ""))...)).
		WithPanel(lines(about{
			"The agent's start-up, p50 and p90, last $window",
			"agent_track: from the agent's join to its audio track. first_audio: from the dispatch to the agent's first audio " +
				"packet. If the join is fast and these are slow, the agent's session starts slowly.",
			units.Seconds, 8, 8,
		},
			query{quantile("0.5", "span_duration_seconds", `span=~"agent_track|first_audio"`), "{{span}} p50"},
			query{quantile("0.9", "span_duration_seconds", `span=~"agent_track|first_audio"`), "{{span}} p90"},
		))
}

func targetSteps(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it LiveKit or the network?")).
		WithPanel(lines(about{
			"Steps before the agent, p50, last $window",
			"The canary creates the room, connects signal and media (including DNS, ICE and DTLS), publishes the echo track, and " +
				"calls the dispatch. Slow steps are slow for callers too, and the agent is not the cause.",
			units.Seconds, 12, 8,
		}, query{quantile("0.5", "span_duration_seconds", stepsBeforeAgent), "{{span}}"})).
		WithPanel(lines(about{
			"Steps before the agent, p90, last $window",
			"The same steps: the 90th percentile, which the slowest tenth exceeds.",
			units.Seconds, 12, 8,
		}, query{quantile("0.9", "span_duration_seconds", stepsBeforeAgent), "{{span}}"})).
		WithPanel(counts(about{
			"Rooms that failed without the agent, last $window",
			"Failed rooms by origin and reason, excluding origin agent and undetermined. Dotted: all rooms that ended.",
			count, 8, 8,
		}, probes(), failures(`origin!~"agent|undetermined"`, "{{origin}}: {{reason}}"))).
		WithPanel(lines(about{
			"Lost packets of the agent's audio, last $window",
			"The share of RTP packets of the agent's audio that did not reach the canary. From about 3 %, speech suffers.",
			share, 8, 8,
		}, query{sum(growth("agent_audio_packets_lost_total", "", "$window")) +
			"\n/ (" + sum(growth("agent_audio_packets_lost_total", "", "$window")) +
			" + " + sum(growth("agent_audio_packets_total", "", "$window")) + " > 0)", "lost"}).Max(1).AxisSoftMax(0.05)).
		WithPanel(lines(about{
			"Jitter of the agent's audio, last $window",
			"Interarrival jitter at the end of each room. A few milliseconds are normal. From about 30 ms, speech breaks up.",
			units.Seconds, 8, 8,
		}, quantiles("agent_audio_jitter_seconds", "")...))
}

func targetPlan(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it the plan?")).
		WithPanel(counts(about{
			"Rooms that reached a plan limit, last $window",
			"Rooms by the limit that LiveKit reported. Dotted: all rooms that ended.",
			count, 8, 7,
		}, probes(), rejections("{{limit}}"))).
		WithPanel(counts(about{
			"Skipped batches, last $window",
			"Ticks that started no batch, by cause: overlap, budget, backoff, paused. Dotted: batches that ended.",
			count, 8, 7,
		}, batches(), skipped("{{cause}}"))).
		WithPanel(lines(about{
			"Agent time, last $window",
			"Agent time as LiveKit bills it: whole minutes per session, from the agent's join to the end of the room. It counts " +
				"towards the project's agent budget.",
			units.Seconds, 8, 7,
		}, query{sum(growth("agent_billed_seconds_total", "", "$window")), "billed"}))
}

func targetBatches(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it the canary? Its batches")).
		WithPanel(counts(about{
			"Batches by result, last $window",
			"ok: every room that opened was ok. degraded: some were ok. failed: none was ok. limited: a plan limit was reached. " +
				"aborted: the canary stopped. Dotted: all batches.",
			count, 8, 7,
		}, batches(), query{sum(growth("batches_total", "", "$window")), "{{result}}"})).
		WithPanel(lines(about{
			"Rooms, last $window",
			"Rooms that ended, and rooms that were aborted because the canary stopped. Aborted rooms are not counted anywhere else.",
			count, 8, 7,
		},
			query{sum(growth("probes_total", "", "$window")), "ended"},
			query{sum(growth("probes_aborted_total", "", "$window")), "aborted"},
		)).
		WithPanel(lines(about{
			"Leftover rooms, last $window",
			"leaked: rooms that the canary could not delete, or that a late agent may have re-created. swept: rooms of an earlier " +
				"run that the canary deleted at its start.",
			count, 8, 7,
		},
			query{sum(growth("rooms_leaked_total", "", "$window")), "leaked"},
			query{sum(growth("rooms_swept_total", "", "$window")), "swept"},
		))
}
