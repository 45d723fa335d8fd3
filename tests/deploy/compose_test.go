package deploy

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

// As `docker compose config` reads it: against the schema of the compose specification.
func compose(t *testing.T, profiles ...string) *types.Project {
	t.Helper()
	options, err := cli.NewProjectOptions(
		[]string{path(t, "deploy", "compose.yml")},
		cli.WithProfiles(profiles),
		cli.WithResolvedPaths(true),
	)
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return project
}

func TestComposeFileIsValidAndEverythingThatItMountsOrBuildsIsThere(t *testing.T) {
	project := compose(t, "livekit")
	for name, service := range project.Services {
		for _, volume := range service.Volumes {
			if volume.Type != types.VolumeTypeBind {
				continue
			}
			if _, err := os.Stat(volume.Source); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if service.Build == nil {
			assertPinned(t, service.Image)
			continue
		}
		dockerfile := service.Build.Dockerfile
		if !filepath.IsAbs(dockerfile) {
			dockerfile = filepath.Join(service.Build.Context, dockerfile)
		}
		if _, err := os.Stat(dockerfile); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestImagesRunTheVersionsThatAreTested(t *testing.T) {
	services := compose(t, "livekit").Services
	// The module of Prometheus 3.16.0 is v0.316.0.
	prometheus := required(t, "rules", "github.com/prometheus/prometheus")
	for service, version := range map[string]string{
		"prometheus": strings.Replace(prometheus, "v0.3", "v3.", 1),
		"livekit":    required(t, "real", "github.com/livekit/livekit-server"),
	} {
		if image := services[service].Image; !strings.HasSuffix(image, ":"+version) {
			t.Errorf("%s is not of %s, which is what is tested", image, version)
		}
	}
}

// The version of a module that tests require.
func required(t *testing.T, tests, module string) string {
	t.Helper()
	_, rest, found := strings.Cut(read(t, path(t, "tests", tests, "go.mod")), "\t"+module+" ")
	if !found {
		t.Fatalf("tests/%s requires no %s", tests, module)
	}
	return strings.Fields(rest)[0]
}

func TestServerAndAgentComeOnlyWithTheirProfile(t *testing.T) {
	without, with := compose(t), compose(t, "livekit")
	for _, name := range []string{"livekit", "agent"} {
		if _, there := without.Services[name]; there {
			t.Errorf("%s starts by itself", name)
		}
		if _, there := with.Services[name]; !there {
			t.Errorf("%s doesn't start", name)
		}
	}
}

func TestEveryPortIsOnLoopbackAlone(t *testing.T) {
	for name, service := range compose(t, "livekit").Services {
		for _, port := range service.Ports {
			if port.HostIP != "127.0.0.1" {
				t.Errorf("%s: port %s is open to the network", name, port.Published)
			}
		}
	}
}

// The canary's own reading of what compose sets.
func TestTheEnvironmentOfTheCanaryIsASetting(t *testing.T) {
	var variables []string
	for name, value := range compose(t).Services["canary"].Environment {
		variables = append(variables, name+"="+*value)
	}
	output, err := command(binary(t), variables, "check").CombinedOutput()
	if err != nil || !strings.Contains(string(output), "support") {
		t.Errorf("%v\n%s", err, output)
	}
}

func TestAlertmanagerTakesItsFile(t *testing.T) {
	run(t, "amtool", "check-config", path(t, "deploy", "prometheus", "alertmanager.yml"))
}

func TestDrillsAreRoutedApart(t *testing.T) {
	file := "--config.file=" + path(t, "deploy", "prometheus", "alertmanager.yml")
	for labels, receiver := range map[string]string{
		"drill=true target=drill-agent-silent": "drills",
		// An alert about the canary itself has no target.
		"drill=true job=livekit-canary": "drills",
		"target=support":                "pages",
	} {
		args := append([]string{"config", "routes", "test", file, "severity=page"}, strings.Fields(labels)...)
		routed := run(t, "amtool", args...)
		// A warning may come before it.
		if words := strings.Fields(routed); words[len(words)-1] != receiver {
			t.Errorf("%s goes to %s", labels, routed)
		}
	}
}
