package main

import (
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/units"
)

// The details of one target.
func target() (dashboard.Dashboard, error) {
	board := begin(targetUid, "LiveKit canary: one target", "How long each step of a call takes, and what fails.").
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
	targetReply(board)
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
		WithPanel(targetStates(24, 4)).
		WithPanel(openIncidents(24, 4)).
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
			levels(column{query{threshold(""), "Within"}, units.Seconds, nil})...)).
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
			query{threshold(`sli="join"`), "threshold"})...)).
		WithPanel(lines(about{
			"Service levels, last $window",
			"The share of eligible rooms that were good. Rooms without an agent are included. Dashed: the objective of the join.",
			share, 12, 8,
		},
			query{serviceLevel("", "$window"), "{{sli}}"},
			query{objective(`sli="join"`), "join objective"},
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
			units.Seconds, 12, 8,
		}, append(quantiles("first_speech_delay_seconds", ""),
			yesterday("first_speech_delay_seconds"),
			slowest("first_speech_delay_seconds", ""),
			query{threshold(`sli="first_speech"`), "threshold"})...)).
		WithPanel(lines(about{
			"The agent's start-up, p50 and p90, last $window",
			"agent_track: from the agent's join to its audio track. first_audio: from the dispatch to the agent's first audio " +
				"packet. If the join is fast and these are slow, the agent's session starts slowly.",
			units.Seconds, 12, 8,
		},
			query{quantile("0.5", "span_duration_seconds", `span=~"agent_track|first_audio"`), "{{span}} p50"},
			query{quantile("0.9", "span_duration_seconds", `span=~"agent_track|first_audio"`), "{{span}} p90"},
		))
}

func targetReply(board *dashboard.DashboardBuilder) {
	const delay, unexplained = "reply_delay_seconds", "reply_unexplained_seconds"
	stage := func(name string) query {
		return query{quantile("0.5", "agent_stage_seconds", `stage="`+name+`"`, "stage"), "the agent's " + name}
	}
	board.WithRow(dashboard.NewRowBuilder("Is it the agent? Its replies")).
		WithPanel(lines(about{
			"Reply delay, last $window",
			"Time from the end of the caller's speech to the agent's reply. Only turns with a reply. Dashed: the threshold of the " +
				"reply objective, and the p90 of the day before.",
			units.Seconds, 8, 8,
		}, append(quantiles(delay, ""), yesterday(delay), slowest(delay, ""),
			query{threshold(`sli="reply"`), "threshold"})...)).
		WithPanel(lines(about{
			"Rooms answered within the threshold, last $window",
			"The reply service level: the share of eligible rooms whose agent answered every turn in time. Turns without a reply " +
				"are included; rooms in which no reply was due are not. Dashed: the objective. Empty if the settings expect no reply.",
			share, 8, 8,
		},
			query{serviceLevel(`sli="reply"`, "$window"), "reply"},
			query{objective(`sli="reply"`), "objective"},
		).Max(1)).
		WithPanel(counts(about{
			"Turns of the caller, last $window",
			"answered. unanswered: no reply, or the agent's session contradicts it. overlapped: both spoke at once, so the delay is " +
				"unknown. not_sent: the call ended before the caller had spoken. Dotted: all turns.",
			count, 8, 8,
		}, turns(), turnsByResult("{{result}}"))).
		WithPanel(bars(about{
			"Where a reply spends its time, p50 of the last $window",
			"First what the caller hears, then what the agent's session reports of the same replies. Its stages overlap, so they do " +
				"not add up: end_of_turn contains transcription. Unexplained: the reply delay minus the agent's end_to_end, which is " +
				"the network, buffers, and what the agent does not measure. Its bar is empty if it is negative. Only the reply delay " +
				"is known of an agent without a LiveKit session.",
			units.Seconds, 12, 9,
		},
			query{quantile("0.5", delay, ""), "reply delay, measured"},
			stage("transcription"), stage("end_of_turn"), stage("llm"), stage("tts"), stage("end_to_end"),
			query{signedQuantile("0.5", unexplained), "unexplained"},
		)).
		WithPanel(signedLines(about{
			"Stages of a reply, p50, last $window",
			"The same over time. A stage that rises with the reply delay is its cause. If only unexplained rises, look at the " +
				"network and at the agent's machine. Negative: the agent reports more than the caller waited for.",
			units.Seconds, 12, 9,
		},
			query{quantile("0.5", delay, ""), "reply delay"},
			query{quantile("0.5", "agent_stage_seconds", ""), "{{stage}}"},
			query{signedQuantile("0.5", unexplained), "unexplained"},
		).AxisSoftMin(0)).
		WithPanel(lines(about{
			"Words that the agent heard wrongly, last $window",
			"The share of the caller's words that the agent's session transcribed wrongly, and the share of turns with at least one " +
				"such word. It rises with a worse STT, and with packets that are lost on their way to the agent. Empty if the agent " +
				"transcribes nothing.",
			share, 12, 8,
		}, append(quantiles("heard_word_error_ratio", ""),
			query{aboveZero("heard_word_error_ratio"), "turns with a wrong word"})...)).
		WithPanel(lines(about{
			"Yield delay, last $window",
			"Time from the start of the caller's interruption until the agent was silent. Only agents that yielded. Empty if the caller " +
				"does not interrupt.",
			units.Seconds, 12, 8,
		}, append(quantiles("yield_delay_seconds", ""), slowest("yield_delay_seconds", ""))...))
}

func targetSteps(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it LiveKit or the network?")).
		WithPanel(lines(about{
			"Steps before the agent, p50, last $window",
			"The canary creates the room, connects signal and media (including DNS, ICE and DTLS), publishes the caller's track, and " +
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
		}, allProbes(), rejections("{{limit}}"))).
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
				"aborted: the canary stopped. Scheduled batches only. Dotted: all of these.",
			count, 8, 7,
		}, batches(), query{scheduled("batches_total", "", "$window"), "{{result}}"})).
		WithPanel(lines(about{
			"Rooms, last $window",
			"Rooms that ended, by the purpose of their batch. Confirmations run while something is wrong. Rooms that were aborted are " +
				"not counted anywhere else.",
			count, 8, 7,
		},
			query{sum(growth("probes_total", "", "$window")), "{{purpose}}"},
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
