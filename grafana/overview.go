package main

import (
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/units"
)

// All targets at once; its rows are an on-call engineer's questions in their order.
func overview() (dashboard.Dashboard, error) {
	board := begin(overviewUid, "LiveKit canary", "Whether callers get an agent, and if not, whose fault it is.").
		Link(dashboard.NewDashboardLinkBuilder("One target").
			Type(dashboard.DashboardLinkTypeLink).
			Icon("dashboard").
			Tooltip("The drill-down").
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
	board.WithRow(dashboard.NewRowBuilder("Are callers hurt?")).
		WithPanel(rows(about{
			"Service levels over the SLO window",
			"The share of rooms that were good, of those that count, over the SLO window; the objective; and what is left of " +
				"the error budget: 100 % where no room failed, 0 where the objective is just met, less where it is missed. " +
				"Rooms: how many the level rests on; a hundred rooms can't tell 99 % from 98 %. Bad batches: one bad batch is a " +
				"moment, many are a habit.",
			count, 15, 9,
		}, []string{"target", "sli"}, levels()...)).
		WithPanel(number(about{
			"Last batch",
			"The share of the rooms of each target's last batch that were ok. One failed room is no outage: look at the next " +
				"batch, or at the service levels.",
			share, 5, 9,
		}, query{known(latest("last_batch_success_ratio", "")), "{{target}}"}).
			Decimals(0).
			Thresholds(steps("red", 0.01, "orange", 1.0, "green"))).
		WithPanel(batchesInWindow(4, 9, "{{target}}")).
		WithPanel(lines(about{
			"Service level, last $window",
			"The share of rooms that were good, of those that count, in the window before each point; dashed: the objective. " +
				"A gap: no room counted.",
			share, 12, 8,
		},
			query{serviceLevel(`sli=~"$sli"`, "$window"), "{{target}} {{sli}}"},
			query{latest("slo_objective_ratio", `sli=~"$sli"`), "{{target}} {{sli}} objective"},
		).Max(1)).
		WithPanel(lines(about{
			"Error budget left over the SLO window",
			"100 %: no room failed in the SLO window before each point. 0: the objective is just met. Below: it is missed. " +
				"Steep: it burns now; level and low: it burnt earlier.",
			share, 12, 8,
		}, query{budgetLeft(`sli=~"$sli"`, "$slo_window"), "{{target}} {{sli}}"}).
			Min(-1).Max(1).
			ThresholdsStyle(common.NewGraphThresholdsStyleConfigBuilder().Mode(common.GraphThresholdsStyleModeLine)).
			Thresholds(steps("red", 0.0, "transparent")))
}

func overallAgent(board *dashboard.DashboardBuilder) {
	const delay = "agent_join_delay_seconds"
	board.WithRow(dashboard.NewRowBuilder("Is it the agent?")).
		WithPanel(lines(about{
			"Join delay of the rooms that an agent joined, last $window",
			"From the dispatch to the agent's join. It covers joined rooms only: where agents stay away it has nothing to say, " +
				"and may even look better. The panel beside it counts those too. Dashed: the threshold of the join objective.",
			units.Seconds, 12, 8,
		}, append(quantiles(delay, "", "position"),
			query{latest("slo_threshold_seconds", `sli="join"`), "{{target}} threshold"})...)).
		WithPanel(lines(about{
			"Rooms joined within the threshold, last $window",
			"The join service level: rooms whose agent joined in time, of all that count, those that no agent joined included. " +
				"Dashed: the objective.",
			share, 12, 8,
		},
			query{serviceLevel(`sli="join"`, "$window"), "{{target}}"},
			query{latest("slo_objective_ratio", `sli="join"`), "{{target}} objective"},
		).Max(1)).
		WithPanel(heatOf(about{
			"Join delays, last $window",
			"How many rooms of the chosen targets had which join delay, in the window before each column. Joined rooms only.",
			units.Seconds, 12, 8,
		}, delay)).
		WithPanel(lines(about{
			"First room of a batch and later ones, p50 of the join delay, last $window",
			"A first room that takes longer than later ones meets a cold start: no idle process, or a worker scaled to zero. " +
				"Joined rooms only.",
			units.Seconds, 12, 8,
		}, query{quantile("0.5", delay, ""), "{{target}} {{position}}"})).
		WithPanel(counts(about{
			"Rooms that the agent failed, last $window",
			"By reason, of origin agent or undetermined (LiveKit took the dispatch, and nobody came). Dotted: all rooms that " +
				"came to an end. docs/reasons.md explains each reason and what to do.",
			count, 24, 8,
		}, probes(), failures(`origin=~"agent|undetermined"`, "{{target}} {{reason}}")))
}

func overallLiveKit(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it LiveKit or the network?")).
		WithPanel(counts(about{
			"Failed rooms by origin, last $window",
			"Who is at fault. livekit, network, limit, external, config and canary say nothing about the agent. " +
				"Dotted: all rooms that came to an end.",
			count, 12, 8,
		}, probes(), failures("", "{{target}} {{origin}}", "reason"))).
		WithPanel(lines(about{
			"The canary's own way in, p90, last $window",
			"What comes before any agent: creating the room, the signal connection, media, publishing the echo track, and the " +
				"dispatch call. Slow here is slow for callers too, and no fault of the agent's.",
			units.Seconds, 12, 8,
		}, query{quantile("0.9", "span_duration_seconds", wayIn), "{{target}} {{span}}"})).
		WithPanel(rows(about{
			"Failures in the time range",
			"Every reason that occurred in the dashboard's time range. A target's link leads to its batches, with the " +
				"evidence of each room.",
			count, 24, 7,
		}, []string{"target", "origin", "reason"}, column{
			query{sum(growth("probe_failures_total", "", "$__range")) + " > 0", "Rooms"}, count,
			decimals(0),
		}))
}

func overallPlan(board *dashboard.DashboardBuilder) {
	const used = prefix + `agent_budget_used_seconds{project=~"$project"}`
	const most = prefix + `agent_budget_seconds{project=~"$project"}`
	const rest = prefix + `backoff_until_timestamp_seconds{project=~"$project"}`
	board.WithRow(dashboard.NewRowBuilder("Is it the plan?")).
		WithPanel(counts(about{
			"Rooms that met a plan limit, last $window",
			"By the limit that the service named. connections, agent_sessions, inference and quota are met by callers too. " +
				"Dotted: all rooms that came to an end.",
			count, 8, 8,
		}, probes(), rejections("{{target}} {{limit}}"))).
		WithPanel(counts(about{
			"Batches that did not open, last $window",
			"Ticks that started no batch: overlap (the batch before still ran), budget (the canary's own, see beside), backoff " +
				"(after a plan limit), paused. Dotted: batches that ended. Too many, and the service levels rest on few rooms.",
			count, 8, 8,
		}, batches(), skipped("{{target}} {{cause}}"))).
		WithPanel(fill(about{
			"Agent budget used",
			"Agent time of this UTC day and calendar month, what running rooms have reserved included, of what the settings " +
				"allow. Full: batches are skipped, and callers are not concerned. Nothing where no budget is set.",
			share, 5, 8,
		}, query{aggregate("max", used, nil) + "\n/ " + aggregate("max", most, nil) + " >= 0", "{{project}} {{period}}"}).Decimals(0)).
		WithPanel(number(about{
			"Rest after a plan limit",
			"How long a project's batches still rest because the service named a limit. Nothing where none does.",
			units.Seconds, 3, 8,
		}, query{aggregate("max", rest, nil) + " - time() > 0", "{{project}}"}).Decimals(0).Thresholds(steps("orange")))
}

func overallCanary(board *dashboard.DashboardBuilder) {
	board.WithRow(dashboard.NewRowBuilder("Is it the canary?")).
		WithPanel(rows(about{
			"Schedules",
			"Whether batches come when they are due. A next batch that is overdue: the canary is stuck, stopped or not " +
				"scraped. A target without a row here is not watched at all.",
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
			"What runs, as last scraped.",
			units.Seconds, 8, 8,
		}, []string{"instance", "version", "revision"},
			column{query{"time() - " + described("process_start_time_seconds"), "Up for"}, units.Seconds, nil},
			column{query{"time() - " + described(prefix+"config_last_reload_success_timestamp_seconds"), "Settings loaded"},
				units.Seconds, nil},
		)).
		WithPanel(lines(about{
			"What should be nought, last $window",
			"Faults of the canary itself, by part; records that its history could not take; rooms that could not be deleted, or " +
				"may have come back. Each is logged with its cause.",
			count, 12, 8,
		},
			query{sum("increase(" + prefix + "internal_errors_total[$window])"), "fault: {{kind}}"},
			query{sum("increase(" + prefix + "history_dropped_total[$window])"), "records dropped"},
			query{sum(growth("rooms_leaked_total", "", "$window")), "{{target}}: rooms leaked"},
		)).
		WithPanel(lines(about{
			"CPU and memory",
			"CPU of the process in cores (left), and its resident memory (right).",
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
			"Whether outcomes and the agent budget are written to disk. Probing goes on without.",
			units.Short, 3, 8,
		}, query{prefix + "history_degraded", "{{instance}}"}).Mappings(words("written", "degraded", false))).
		WithPanel(number(about{
			"Settings",
			"Whether the last load of the settings was taken. Refused: those before it are in force; the log and the status " +
				"page say why.",
			units.Short, 3, 8,
		}, query{prefix + "config_last_reload_successful", "{{instance}}"}).Mappings(words("refused", "in force", true)))
}

// With the labels of the canary's build.
func described(gauge string) string {
	return gauge + " * on (job, instance) group_right () " + prefix + "build_info"
}

// Series of `process_*` carry no name of ours.
func ofCanary(expr string) string {
	return expr + " and on (job, instance) " + prefix + "build_info"
}
