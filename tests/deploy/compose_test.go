package deploy

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

// What a person exports to probe a project.
var own = []string{"LIVEKIT_URL=wss://main.livekit.cloud", "AGENT_NAME=support"}

// As `docker compose config` reads it: against the schema of the compose specification.
func load(t *testing.T, environment []string) (*types.Project, error) {
	t.Helper()
	options, err := cli.NewProjectOptions(
		[]string{path(t, "deploy", "compose.yml")},
		cli.WithEnv(environment),
		cli.WithDefaultProfiles(),
		cli.WithResolvedPaths(true),
	)
	if err != nil {
		t.Fatal(err)
	}
	return options.LoadProject(context.Background())
}

func compose(t *testing.T, environment []string) *types.Project {
	t.Helper()
	project, err := load(t, environment)
	if err != nil {
		t.Fatal(err)
	}
	return project
}

// The variables of `--env-file deploy/demo/compose.env`.
func demo(t *testing.T) []string {
	t.Helper()
	var variables []string
	for _, line := range strings.Split(read(t, path(t, "deploy", "demo", "compose.env")), "\n") {
		if strings.Contains(line, "=") {
			variables = append(variables, line)
		}
	}
	return variables
}

func TestForgottenURLOrAgentIsAnError(t *testing.T) {
	for i, missing := range []string{"LIVEKIT_URL", "AGENT_NAME"} {
		_, err := load(t, slices.Delete(slices.Clone(own), i, i+1))
		if err == nil || !strings.Contains(err.Error(), "set "+missing) {
			t.Errorf("%s: %v", missing, err)
		}
	}
}

func TestComposeFileIsValidAndEverythingThatItMountsOrBuildsIsThere(t *testing.T) {
	project := compose(t, demo(t))
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
	services := compose(t, demo(t)).Services
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
	without, with := compose(t, own), compose(t, demo(t))
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
	for name, service := range compose(t, demo(t)).Services {
		for _, port := range service.Ports {
			if port.HostIP != "127.0.0.1" {
				t.Errorf("%s: port %s is open to the network", name, port.Published)
			}
		}
	}
}

// The canary's own reading of what compose sets.
func TestTheEnvironmentOfTheCanaryIsASetting(t *testing.T) {
	project := compose(t, demo(t))
	var variables []string
	for name, value := range project.Services["canary"].Environment {
		// Where the container has its secrets, compose has their files.
		for secret, source := range project.Secrets {
			*value = strings.ReplaceAll(*value, "/run/secrets/"+secret, source.File)
		}
		variables = append(variables, name+"="+*value)
	}
	output, err := command(binary(t), variables, "check").CombinedOutput()
	if err != nil || !strings.Contains(string(output), "support") {
		t.Errorf("%v\n%s", err, output)
	}
}

// As a new user has it: with what is in the file, the month's cost is within the budget, and the key pair is in no variable.
func TestDefaultsOfComposeFitTheBudget(t *testing.T) {
	environment := compose(t, own).Services["canary"].Environment
	var variables []string
	for name, value := range environment {
		if strings.Contains(name, "LIVEKIT_API") {
			t.Errorf("%s shows the key pair to everyone who may inspect the container", name)
		}
		if !strings.Contains(name, "_file") {
			variables = append(variables, name+"="+*value)
		}
	}
	variables = append(variables, "LIVEKIT_API_KEY=key", "LIVEKIT_API_SECRET=secret")
	output, err := command(binary(t), variables, "check").CombinedOutput()
	if err != nil || !strings.Contains(string(output), "every 15m") || strings.Contains(string(output), "warning") {
		t.Errorf("%v\n%s", err, output)
	}
}

// From Alertmanager to the log of the service.
func TestPagerPrintsThePage(t *testing.T) {
	port, manager := freePort(t), freePort(t)
	pager := exec.Command("python3", "-u", path(t, "deploy", "prometheus", "pager.py"), port)
	output, err := pager.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := pager.Start(); err != nil {
		t.Fatal(err)
	}
	defer pager.Process.Kill()
	lines := bufio.NewScanner(output)
	lines.Scan()

	file := filepath.Join(t.TempDir(), "alertmanager.yml")
	deployed := read(t, path(t, "deploy", "prometheus", "alertmanager.yml"))
	write(t, file, strings.Replace(deployed, "http://pager:9094/", "http://127.0.0.1:"+port+"/", 1))
	background(t, "prometheus-alertmanager", "--config.file="+file, "--storage.path="+t.TempDir(),
		"--cluster.listen-address=", "--web.listen-address=127.0.0.1:"+manager)
	eventually(t, "Alertmanager", func() error {
		return exec.Command("amtool", "--alertmanager.url=http://127.0.0.1:"+manager, "alert", "add", "AgentFailing",
			"severity=page", "target=support", "--annotation=summary=the agent is silent").Run()
	})
	if !lines.Scan() || !strings.HasPrefix(lines.Text(), "FIRING AgentFailing support - the agent is silent") {
		t.Errorf("it prints %q", lines.Text())
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
