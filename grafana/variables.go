package main

import (
	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

const (
	overviewUid = "livekit-canary-overview"
	targetUid   = "livekit-canary-target"
)

// A dashboard with what both have.
func begin(uid, title, description string) *dashboard.DashboardBuilder {
	return dashboard.NewDashboardBuilder(title).
		Uid(uid).
		Description(description).
		Tags([]string{"livekit", "canary"}).
		Time("now-24h", "now").
		Refresh("1m").
		Tooltip(dashboard.DashboardCursorSyncCrosshair).
		Link(dashboard.NewDashboardLinkBuilder("Status page").
			Type(dashboard.DashboardLinkTypeLink).
			Icon("external link").
			Tooltip("What the canary does now, and its latest batches, room by room").
			Url("${status_page:raw}/").
			TargetBlank(true))
}

func datasourceVariable() cog.Builder[dashboard.VariableModel] {
	return dashboard.NewDatasourceVariableBuilder("datasource").
		Label("Prometheus").
		Description("The Prometheus that scrapes the canary.").
		Type("prometheus")
}

func targetVariables(several bool) []cog.Builder[dashboard.VariableModel] {
	project := fromLabel("project", "Project", "LiveKit projects, by their names in the canary's settings.",
		"label_values(livekit_canary_target_info, project)", several)
	target := fromLabel("target", "Target", "Agents that are watched, by their names in the canary's settings.",
		`label_values(livekit_canary_target_info{project=~"$project"}, target)`, several)
	return []cog.Builder[dashboard.VariableModel]{project, target}
}

func fromLabel(name, label, description, query string, several bool) cog.Builder[dashboard.VariableModel] {
	variable := dashboard.NewQueryVariableBuilder(name).
		Label(label).
		Description(description).
		Datasource(datasource()).
		Query(text(query)).
		Refresh(dashboard.VariableRefreshOnTimeRangeChanged).
		Sort(dashboard.VariableSortAlphabeticalAsc).
		Multi(several).
		IncludeAll(several)
	if several {
		// A lone target or project is what the drill-down begins with.
		variable.Current(option("All", "$__all"))
	}
	return variable
}

func windowVariables() []cog.Builder[dashboard.VariableModel] {
	return []cog.Builder[dashboard.VariableModel]{
		interval("window", "Window", "1h", "10m,30m,1h,2h,6h,12h,1d,3d,7d",
			"Every point of a graph looks back so far. It should hold four batches or more (1h at one every 15 min), "+
				"or a single room makes a trend; the panel \"Batches in the window\" tells."),
		interval("slo_window", "SLO window", "30d", "1d,7d,28d,30d,90d",
			"The window of the objectives. Prometheus must keep as much (--storage.tsdb.retention.time)."),
	}
}

// Of type custom: Grafana picks none of these by itself, whatever the time range.
func interval(name, label, value, values, description string) cog.Builder[dashboard.VariableModel] {
	return dashboard.NewCustomVariableBuilder(name).
		Label(label).
		Description(description).
		Values(text(values)).
		AllowCustomValue(true).
		Current(option(value, value))
}

func sliVariable() cog.Builder[dashboard.VariableModel] {
	return dashboard.NewCustomVariableBuilder("sli").
		Label("Service level").
		Description("The service levels whose course is shown. availability: rooms that were ok, of those that LiveKit " +
			"and the network let come to a verdict on the agent. service: rooms that were ok, of all.").
		Values(text("availability,join,first_speech,service")).
		Multi(true).
		IncludeAll(true).
		Current(options("availability"))
}

func statusPageVariable() cog.Builder[dashboard.VariableModel] {
	return dashboard.NewTextBoxVariableBuilder("status_page").
		Label("Status page").
		Description("Where your browser reaches the canary, without a slash at the end; links lead there.").
		DefaultValue(text("http://localhost:9787")).
		Current(option("http://localhost:9787", "http://localhost:9787"))
}

// Region, environment, cluster: whatever the scrape configuration adds.
func filterVariable() cog.Builder[dashboard.VariableModel] {
	return dashboard.NewAdHocVariableBuilder("filters").
		Label("Filters").
		Description("Narrows every query by labels that the scrape configuration adds, such as region or env.").
		Datasource(datasource())
}

func targetUrl(target string) string {
	return "/d/" + targetUid + "?var-target=" + target +
		"&${datasource:queryparam}&${window:queryparam}&${slo_window:queryparam}&${status_page:queryparam}&${__url_time_range}"
}

func text(value string) dashboard.StringOrMap {
	return dashboard.StringOrMap{String: &value}
}

func option(text, value string) dashboard.VariableOption {
	return dashboard.VariableOption{
		Selected: cog.ToPtr(true),
		Text:     dashboard.StringOrArrayOfString{String: &text},
		Value:    dashboard.StringOrArrayOfString{String: &value},
	}
}

func options(values ...string) dashboard.VariableOption {
	return dashboard.VariableOption{
		Selected: cog.ToPtr(true),
		Text:     dashboard.StringOrArrayOfString{ArrayOfString: values},
		Value:    dashboard.StringOrArrayOfString{ArrayOfString: values},
	}
}
