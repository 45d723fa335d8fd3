package main

import (
	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

const (
	overviewUid = "livekit-canary-overview"
	targetUid   = "livekit-canary-target"
)

// A dashboard with the settings that both dashboards share.
func begin(uid, title, description string) *dashboard.DashboardBuilder {
	return dashboard.NewDashboardBuilder(title).
		Uid(uid).
		Description(description).
		Tags([]string{"livekit", "canary"}).
		Time("now-24h", "now").
		Refresh("1m").
		Tooltip(dashboard.DashboardCursorSyncCrosshair).
		Annotation(annotation("Alerts", "red", "{{alertname}} {{target}}",
			`ALERTS{component="livekit-canary", alertstate="firing", severity="page", target=~"$target|"}`)).
		Annotation(annotation("Reloads", "blue", "{{instance}} loaded its settings",
			"changes("+prefix+"config_last_reload_success_timestamp_seconds[$__interval]) > 0")).
		Link(dashboard.NewDashboardLinkBuilder("Status page").
			Type(dashboard.DashboardLinkTypeLink).
			Icon("external link").
			Tooltip("What the canary is doing, and its latest batches with every room").
			Url("${status_page:raw}/").
			TargetBlank(true))
}

// Marks on every graph: the times at which the query has a value.
func annotation(name, colour, text, expr string) cog.Builder[dashboard.AnnotationQuery] {
	queries := ranges([]query{{expr, text}})
	return dashboard.NewAnnotationQueryBuilder().
		Name(name).
		Datasource(datasource()).
		Enable(true).
		Hide(false).
		IconColor(colour).
		Target(queries[0]).
		TitleFormat(text)
}

func datasourceVariable() cog.Builder[dashboard.VariableModel] {
	return dashboard.NewDatasourceVariableBuilder("datasource").
		Label("Prometheus").
		Description("The Prometheus that scrapes the canary.").
		Type("prometheus")
}

func targetVariables(several bool) []cog.Builder[dashboard.VariableModel] {
	project := fromLabel("project", "Project", "LiveKit projects by their names in the canary's settings.",
		"label_values(livekit_canary_target_info, project)", several)
	target := fromLabel("target", "Target", "Monitored agents by the names of their targets in the canary's settings.",
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
		// Without this, Grafana preselects only the first target and project.
		variable.Current(option("All", "$__all"))
	}
	return variable
}

func windowVariables() []cog.Builder[dashboard.VariableModel] {
	return []cog.Builder[dashboard.VariableModel]{
		interval("window", "Window", "1h", "10m,30m,1h,2h,6h,12h,1d,3d,7d",
			"The period before each point of a graph that the point covers. It should contain at least four batches (1h for one "+
				"every 15 min); otherwise a single room looks like a trend. The panel \"Batches in the window\" shows the number."),
	}
}

// Type custom, because Grafana would choose a value of type interval by the time range.
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
		Description("The service levels to show over time. availability: the share of ok rooms, excluding failures of LiveKit, " +
			"the network and the plan. service: the share of ok rooms, including them.").
		Values(text("availability,join,first_speech,reply,service")).
		Multi(true).
		IncludeAll(true).
		Current(options("availability"))
}

func statusPageVariable() cog.Builder[dashboard.VariableModel] {
	return dashboard.NewTextBoxVariableBuilder("status_page").
		Label("Status page").
		Description("The address at which your browser reaches the canary, without a slash at the end. Links use it.").
		DefaultValue(text("http://localhost:9787")).
		Current(option("http://localhost:9787", "http://localhost:9787"))
}

// Filters by labels that the scrape configuration adds, such as region, environment or cluster.
func filterVariable() cog.Builder[dashboard.VariableModel] {
	return dashboard.NewAdHocVariableBuilder("filters").
		Label("Filters").
		Description("Narrows every query by labels that the scrape configuration adds, such as region or env.").
		Datasource(datasource())
}

func targetUrl(target string) string {
	return "/d/" + targetUid + "?var-target=" + target +
		"&${datasource:queryparam}&${window:queryparam}&${status_page:queryparam}&${__url_time_range}"
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
