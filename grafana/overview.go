package main

import (
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/units"
)

// All targets. The rows are an on-call engineer's questions, in the order in which they arise.
func overview() (dashboard.Dashboard, error) {
	board := begin(overviewUid, "LiveKit canary", "Whether callers get an agent, and if not, which part fails.").
		Link(dashboard.NewDashboardLinkBuilder("One target").
			Type(dashboard.DashboardLinkTypeLink).
			Icon("dashboard").
			Tooltip("Details of one target").
			Url("/d/" + targetUid).
			IncludeVars(false).
			KeepTime(true)).
		WithVariable(datasourceVariable())
	for _, variable := range targetVariables(true) {
		board.WithVariable(variable)
	}
	for _, variable := range windowVariables() {
		board.WithVariable(variable)
	}
	board.WithVariable(sliVariable()).WithVariable(filterVariable()).WithVariable(statusPageVariable())

	overallService(board)
	overallAgent(board)
	overallLiveKit(board)
	overallPlan(board)
	overallCanary(board)
	return board.Build()
}

func overallService(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Are callers affected?")).
		WithPanel(targetStates(24, 6)).
		WithPanel(openIncidents(24, 5)).
		WithPanel(rows(about{
			"Service levels over the SLO window",
			"Service level: the share of eligible rooms that were good over the SLO window of the alert rules. Error budget left: " +
				"100 % if no room failed, 0 if the objective is just met, negative if it is missed. It is empty below 100 rooms, " +
				"and -100 % means that or less. Bad batches: one is an incident, many show a lasting problem. The recording rules " +
				"in deploy/prometheus must be loaded.",
			count, 15, 9,
		}, []string{"target", "sli"}, levels()...)).
		WithPanel(number(about{
			"Last batch",
			"The share of ok rooms in the last batch of each target. One failed room is not an outage: check the next batch or " +
				"the service levels.",
			share, 5, 9,
		}, query{known(latest("last_batch_success_ratio", "")), "{{target}}"}).
			Decimals(0).
			Thresholds(steps("red", 0.01, "orange", 1.0, "green"))).
		WithPanel(batchesInWindow(4, 9, "{{target}}")).
		WithPanel(states(about{
			"Result of the last batch",
			"The rooms of each target's last batch at each time: all ok, some ok (degraded), or none ok (failed). An aborted batch " +
				"changes nothing.",
			share, 24, 6,
		}, query{known(latest("last_batch_success_ratio", "")), "{{target}}"})).
		WithPanel(lines(about{
			"Service level, last $window",
			"The share of eligible rooms that were good in the window before each point. Dashed: the objective. A gap means " +
				"that no room was eligible.",
			share, 12, 8,
		},
			query{serviceLevel(`sli=~"$sli"`, "$window"), "{{target}} {{sli}}"},
			query{objective(`sli=~"$sli"`), "{{target}} {{sli}} objective"},
		).Max(1)).
		WithPanel(lines(about{
			"Error budget left over the SLO window",
			"100 %: no room failed in the SLO window before each point. 0: the objective is just met. Negative: it is missed; " +
				"-100 % means that or less. A steep fall means that the budget burns now. A low, flat line means that it burnt " +
				"earlier. Empty below 100 rooms.",
			share, 12, 8,
		}, query{budgetLeft(`sli=~"$sli"`), "{{target}} {{sli}}"}).
			Min(-1).Max(1).
			ThresholdsStyle(common.NewGraphThresholdsStyleConfigBuilder().Mode(common.GraphThresholdsStyleModeLine)).
			Thresholds(steps("red", 0.0, "transparent")))
}

func overallAgent(board *dashboard.DashboardBuilder) {
	const delay = "agent_join_delay_seconds"
	board.WithRow(dashboard.NewRowBuilder("Is it the agent?")).
		WithPanel(lines(about{
			"Join delay of the rooms that an agent joined, last $window",
			"Time from the dispatch to the agent's join, in rooms that an agent joined. Rooms without an agent are missing here, " +
				"so an outage can look like an improvement; the next panel includes them. Dashed: the threshold of the join " +
				"objective, and the p90 of the day before.",
			units.Seconds, 12, 8,
		}, append(quantiles(delay, "", "position"),
			yesterday(delay, "position"),
			query{threshold(`sli="join"`), "{{target}} threshold"})...)).
		WithPanel(lines(about{
			"Rooms joined within the threshold, last $window",
			"The join service level: the share of eligible rooms whose agent joined in time. Rooms that no agent joined are " +
				"included. Dashed: the objective.",
			share, 12, 8,
		},
			query{serviceLevel(`sli="join"`, "$window"), "{{target}}"},
			query{objective(`sli="join"`), "{{target}} objective"},
		).Max(1)).
		WithPanel(heatOf(about{
			"Join delays, last $window",
			"Distribution of the join delays of the chosen targets, in the window before each column. Only rooms that an agent joined.",
			units.Seconds, 12, 8,
		}, delay)).
		WithPanel(lines(about{
			"First room of a batch and later ones, p50 of the join delay, last $window",
			"If the first room takes longer than later ones, the agent has a cold start: no idle process, or a worker that was " +
				"scaled to zero. Only rooms that an agent joined.",
			units.Seconds, 12, 8,
		}, query{quantile("0.5", delay, ""), "{{target}} {{position}}"})).
		WithPanel(lines(about{
			"Reply delay, last $window",
			"Time from the end of the caller's speech to the agent's reply. Turns without a reply are missing here; the next panel " +
				"includes them. Dashed: the threshold of the reply objective.",
			units.Seconds, 12, 8,
		}, append(quantiles("reply_delay_seconds", ""),
			query{threshold(`sli="reply"`), "{{target}} threshold"})...)).
		WithPanel(lines(about{
			"Rooms answered within the threshold, last $window",
			"The reply service level: the share of eligible rooms whose agent answered every turn in time. Turns without a reply " +
				"are included; rooms in which no reply was due are not. Dashed: the objective.",
			share, 12, 8,
		},
			query{serviceLevel(`sli="reply"`, "$window"), "{{target}}"},
			query{objective(`sli="reply"`), "{{target}} objective"},
		).Max(1)).
		WithPanel(counts(about{
			"Rooms that the agent failed, last $window",
			"Failed rooms by reason, with origin agent or undetermined (LiveKit accepted the dispatch, but no agent joined). " +
				"Dotted: all rooms that ended. docs/reasons.md explains each reason and what to do.",
			count, 24, 8,
		}, probes(), failures(`origin=~"agent|undetermined"`, "{{target}} {{reason}}")))
}

func overallLiveKit(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it LiveKit or the network?")).
		WithPanel(counts(about{
			"Failed rooms by origin, last $window",
			"The part that failed. Failures with origin livekit, network, limit, external, config or canary say nothing about " +
				"the agent. Dotted: all rooms that ended.",
			count, 12, 8,
		}, probes(), failures("", "{{target}} {{origin}}", "reason"))).
		WithPanel(lines(about{
			"Steps before the agent, p90, last $window",
			"The canary's own steps: it creates the room, connects signal and media, publishes the caller's track, and calls the " +
				"dispatch. Slow steps are slow for callers too, and the agent is not the cause.",
			units.Seconds, 12, 8,
		}, query{quantile("0.9", "span_duration_seconds", stepsBeforeAgent), "{{target}} {{span}}"})).
		WithPanel(rows(about{
			"Failures in the time range",
			"Every reason that occurred in scheduled batches in the dashboard's time range. The link of a target opens its batches, with the evidence " +
				"of each room.",
			count, 24, 7,
		}, []string{"target", "origin", "reason"}, column{
			query{scheduled("probe_failures_total", "", "$__range") + " > 0", "Rooms"}, count,
			decimals(0),
		}))
}

func overallPlan(board *dashboard.DashboardBuilder) {
	const used = prefix + `agent_budget_used_seconds{project=~"$project"}`
	const reserved = prefix + `agent_budget_reserved_seconds{project=~"$project"}`
	const most = prefix + `agent_budget_seconds{project=~"$project"}`
	const rest = prefix + `backoff_until_timestamp_seconds{project=~"$project"}`
	board.WithRow(dashboard.NewRowBuilder("Is it the plan?")).
		WithPanel(counts(about{
			"Rooms that reached a plan limit, last $window",
			"Rooms by the limit that LiveKit reported. The limits connections, agent_sessions, inference and quota affect " +
				"callers too. Dotted: all rooms that ended.",
			count, 8, 8,
		}, allProbes(), rejections("{{target}} {{limit}}"))).
		WithPanel(counts(about{
			"Skipped batches, last $window",
			"Ticks that started no batch. overlap: the previous batch still ran. budget: the agent budget is spent. backoff: a " +
				"pause after a plan limit. paused: by hand. Dotted: batches that ended. Many skipped batches leave few rooms for " +
				"the service levels.",
			count, 8, 8,
		}, batches(), skipped("{{target}} {{cause}}"))).
		WithPanel(fill(about{
			"Agent budget used and reserved",
			"Agent time of this UTC day and calendar month, as a share of the budget: what ended rooms used, and what open rooms " +
				"have reserved. At 100 % together, the canary skips batches; callers are not affected. Empty if no budget is set.",
			share, 5, 8,
		},
			query{aggregate("max", used, nil) + "\n/ " + aggregate("max", most, nil) + " >= 0", "{{project}} {{period}} used"},
			query{aggregate("max", reserved, nil) + "\n/ " + aggregate("max", most, nil) + " >= 0",
				"{{project}} {{period}} reserved"},
		).Decimals(0)).
		WithPanel(number(about{
			"Pause after a plan limit",
			"How long a project still opens no rooms because LiveKit reported a plan limit. Empty if there is no pause.",
			units.Seconds, 3, 8,
		}, query{aggregate("max", rest, nil) + " - time() > 0", "{{project}}"}).Decimals(0).Thresholds(steps("orange")))
}

func overallCanary(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it the canary?")).
		WithPanel(rows(about{
			"Schedules",
			"Whether batches start when they are due. An overdue next batch means that the canary is stuck, stopped or not " +
				"scraped. A target without a row here is not monitored.",
			units.Seconds, 16, 8,
		}, []string{"target"},
			column{query{latest("target_paused", ""), "Schedule"}, count,
				append(coloured("color-text", "green", 1.0, "orange"),
					dashboard.DynamicConfigValue{Id: "mappings", Value: words("runs", "paused", false)})},
			column{query{latest("batch_interval_mean_seconds", ""), "Mean interval"}, units.Seconds, nil},
			column{query{latest("batch_interval_shortest_seconds", ""), "Shortest"}, units.Seconds, nil},
			column{query{latest("batch_interval_seconds", ""), "Longest"}, units.Seconds, nil},
			column{query{ago("last_tick_timestamp_seconds"), "Since the last tick"}, units.Seconds, nil},
			column{query{ago("last_batch_completed_timestamp_seconds"), "Since the last batch"}, units.Seconds, nil},
			column{query{until("next_batch_timestamp_seconds"), "Next batch in"}, units.Seconds,
				coloured("color-text", "red", 0.0, "text")},
			column{query{latest("rooms_in_flight", ""), "Open rooms"}, count, nil},
		)).
		WithPanel(rows(about{
			"Canaries",
			"The canaries that Prometheus scrapes, with their versions.",
			units.Seconds, 8, 8,
		}, []string{"instance", "version", "revision"},
			column{query{"time() - " + described("process_start_time_seconds"), "Up for"}, units.Seconds, nil},
			column{query{"time() - " + described(prefix+"config_last_reload_success_timestamp_seconds"), "Settings loaded"},
				units.Seconds, nil},
		)).
		WithPanel(lines(about{
			"What should be zero, last $window",
			"Internal errors of the canary, by part. Records that it could not write to its history. Rooms that it could not " +
				"delete, or that may exist again. The log has the cause of each.",
			count, 12, 8,
		},
			query{sum("increase(" + prefix + "internal_errors_total[$window])"), "internal error: {{kind}}"},
			query{sum("increase(" + prefix + "history_dropped_total[$window])"), "records dropped"},
			query{sum(growth("rooms_leaked_total", "", "$window")), "{{target}}: rooms leaked"},
		)).
		WithPanel(lines(about{
			"CPU and memory",
			"CPU of the process in cores (left axis), and its resident memory (right axis).",
			count, 6, 8,
		},
			query{ofCanary("rate(process_cpu_seconds_total[$__rate_interval])"), "{{instance}} CPU"},
			query{ofCanary("process_resident_memory_bytes"), "{{instance}} memory"},
		).OverrideByRegexp("/memory$/", []dashboard.DynamicConfigValue{
			{Id: "unit", Value: units.BytesIEC},
			{Id: "custom.axisPlacement", Value: "right"},
		})).
		WithPanel(number(about{
			"History",
			"Whether outcomes and the agent budget are written to disk. Probing continues without it.",
			units.Short, 3, 8,
		}, query{prefix + "history_degraded", "{{instance}}"}).Mappings(words("written", "degraded", false))).
		WithPanel(number(about{
			"Settings",
			"Whether the canary accepted the settings at the last load. If it rejected them, it still uses the previous ones; the " +
				"log and the status page show why.",
			units.Short, 3, 8,
		}, query{prefix + "config_last_reload_successful", "{{instance}}"}).Mappings(words("rejected", "in force", true)))
}

// A gauge with the labels of the canary's build.
func described(gauge string) string {
	return gauge + " * on (job, instance) group_right () " + prefix + "build_info"
}

// Selects the `process_*` series of canaries, whose names have no prefix of the canary.
func ofCanary(expr string) string {
	return expr + " and on (job, instance) " + prefix + "build_info"
}
