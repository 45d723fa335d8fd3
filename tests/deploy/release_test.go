package deploy

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
)

// Runs the script of a release on the binary that is built, and returns its folder. CI can't compile for other processors.
var released = sync.OnceValues(func() (string, error) {
	found, err := programs()
	if err != nil {
		return "", err
	}
	folder, err := filepath.Abs(filepath.Join(root, "dist"))
	if err != nil {
		return "", err
	}
	file, err := filepath.Abs(builtBinary())
	if err != nil {
		return "", err
	}
	script := exec.Command(root+"/deploy/release.sh", "--binary", file)
	script.Env = append(os.Environ(), "PATH="+found["CARGO_DEB"]+":"+os.Getenv("PATH"))
	output, err := script.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("release.sh: %w\n%s", err, output)
	}
	return folder, nil
})

// The path of the one file of the release that has this name; * stands for the version.
func releaseFile(t *testing.T, name string) string {
	t.Helper()
	folder, err := released()
	if err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join(folder, name))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s: %v %v", name, found, err)
	}
	return found[0]
}

func TestReleaseHasChecksumsOfAllItsFiles(t *testing.T) {
	sums := releaseFile(t, "SHA256SUMS")
	check := exec.Command("sha256sum", "--check", "--strict", filepath.Base(sums))
	check.Dir = filepath.Dir(sums)
	if output, err := check.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, output)
	}
	if lines := strings.Count(read(t, sums), "\n"); lines != 4 {
		t.Errorf("archive, package, image and chart are %d files:\n%s", lines, read(t, sums))
	}
}

func TestArchiveOfTheReleaseHasWhatAnInstallationNeeds(t *testing.T) {
	folder := t.TempDir()
	run(t, "tar", "--extract", "--directory", folder, "--strip-components=1", "--file", releaseFile(t, "livekit-canary-*-amd64.tgz"))
	for _, file := range []string{"LICENSE", "canary.toml", "livekit-canary.service", "livekit-canary.rules.yml"} {
		read(t, filepath.Join(folder, file))
	}
	run(t, filepath.Join(folder, "livekit-canary"), "drill", "--help")
}

func TestChartOfTheReleaseIsThatOfTheRepository(t *testing.T) {
	chart, err := loader.Load(releaseFile(t, "livekit-canary-chart-*.tgz"))
	if err != nil {
		t.Fatal(err)
	}
	with := map[string]any{"settings": "[targets.support]", "dashboards": map[string]any{"enabled": true}}
	packed, err := templateOf(chart, chartutil.Values(with))
	if err != nil {
		t.Fatal(err)
	}
	if strings.Join(manifests(packed), "") != strings.Join(manifests(render(t, with)), "") {
		t.Error("it differs")
	}
}

// The version of the crate is that of the chart, and of the image that the chart runs.
func TestChartAndCrateHaveOneVersion(t *testing.T) {
	chart := read(t, path(t, "deploy", "helm", "livekit-canary", "Chart.yaml"))
	_, rest, _ := strings.Cut(read(t, path(t, "Cargo.toml")), "\nversion = \"")
	version, _, _ := strings.Cut(rest, "\"")
	for _, key := range []string{"version: ", "appVersion: "} {
		if !strings.Contains(chart, "\n"+key+version+"\n") {
			t.Errorf("%s is not %s", key, version)
		}
	}
}

// Starts the image as compose and the chart do: with a root that it can't write to, and without capabilities. The network has
// nothing but a loopback interface. Returns the name of the container.
func container(t *testing.T, options []string, command ...string) string {
	t.Helper()
	loaded := strings.Fields(run(t, "podman", "load", "--quiet", "--input", releaseFile(t, "livekit-canary-image-*.tar")))
	// By its id, because it may have been loaded under more than one name.
	image := strings.TrimSpace(run(t, "podman", "image", "inspect", "--format", "{{.Id}}", loaded[len(loaded)-1]))
	args := []string{
		"--runtime", "runc", "run", "--detach", "--network", "none", "--read-only", "--cap-drop", "all",
		"--security-opt", "no-new-privileges", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=4096:4096",
	}
	args = append(append(append(args, options...), image), command...)
	output, err := exec.Command("podman", args...).Output()
	if err != nil {
		t.Fatalf("podman %s: %v\n%s", strings.Join(args, " "), err, err.(*exec.ExitError).Stderr)
	}
	name := strings.TrimSpace(string(output))
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := exec.Command("podman", "logs", name).CombinedOutput()
			t.Logf("%s", log)
		}
		run(t, "podman", "--runtime", "runc", "rm", "--force", "--volumes", "--time", "0", name)
		run(t, "podman", "rmi", "--force", image)
	})
	return name
}

// Asks the canary in the container, with the only program that is there.
func ask(container, path string) (string, error) {
	url := "http://127.0.0.1:9787" + path
	output, err := exec.Command("podman", "--runtime", "runc", "exec", container, "/usr/bin/livekit-canary", "health", url).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", path, err, output)
	}
	return string(output), err
}

// By the health check that the image declares.
func awaitHealth(t *testing.T, container string) {
	t.Helper()
	eventually(t, "the container to be healthy", func() error {
		if running := run(t, "podman", "inspect", "--format", "{{.State.Running}}", container); running != "true\n" {
			t.Fatal("the canary has ended")
		}
		output, err := exec.Command("podman", "--runtime", "runc", "healthcheck", "run", container).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, output)
		}
		return err
	})
}

func TestImageRunsADrillAsAUserWithoutRights(t *testing.T) {
	drill := container(t, nil, "drill", "ok", "--rooms", "1", "--every", "5s")
	awaitHealth(t, drill)
	eventually(t, "the first batch", func() error {
		answer, err := ask(drill, "/api/v1/batches?limit=1")
		if err == nil && !strings.Contains(answer, `"result":"ok"`) {
			err = fmt.Errorf("no batch is ok: %s", answer)
		}
		return err
	})
	pid := strings.TrimSpace(run(t, "podman", "inspect", "--format", "{{.State.Pid}}", drill))
	if status := read(t, "/proc/"+pid+"/status"); !strings.Contains(status, "Uid:\t65532\t65532\t65532\t65532\n") {
		t.Errorf("it has another user:\n%s", status)
	}
	var labels map[string]string
	if err := json.Unmarshal([]byte(run(t, "podman", "inspect", "--format", "{{json .Config.Labels}}", drill)), &labels); err != nil {
		t.Fatal(err)
	}
	for _, label := range []string{"title", "source", "licenses", "version", "revision"} {
		if value := labels["org.opencontainers.image."+label]; value == "" || value == "unknown" {
			t.Errorf("the label %s is %q", label, value)
		}
	}
	run(t, "podman", "--runtime", "runc", "stop", "--time", "60", drill)
	if code := strings.TrimSpace(run(t, "podman", "inspect", "--format", "{{.State.ExitCode}}", drill)); code != "0" {
		t.Errorf("it ended with %s", code)
	}
}

func TestImageKeepsItsStateAndIsHealthyWithTLSAndUsers(t *testing.T) {
	folder := t.TempDir()
	webSecret(t, folder, serverCertificate)
	// As secrets have it, which a container gets for its user.
	run(t, "chmod", "-R", "a+rX", filepath.Dir(folder))
	options := []string{
		"--volume", folder + ":/web:ro",
		"--env", "LIVEKIT_CANARY__http__web_config_file=/web/web.yml",
		"--env", "LIVEKIT_URL=ws://127.0.0.1:9", "--env", "LIVEKIT_API_KEY=key", "--env", "LIVEKIT_API_SECRET=secret",
		"--env", "LIVEKIT_CANARY__targets__support__agent_name=support",
		"--env", "LIVEKIT_CANARY__lifetime__startup_delay=1h",
	}
	canary := container(t, options)
	awaitHealth(t, canary)
	if answer, err := ask(canary, "/metrics"); err == nil {
		t.Errorf("a scrape needs no user: %s", answer)
	}
	volume := run(t, "podman", "inspect", "--format", "{{(index .Mounts 0).Source}} {{(index .Mounts 1).Source}}", canary)
	for _, source := range strings.Fields(volume) {
		if _, err := os.Stat(filepath.Join(source, "history.sqlite3")); err == nil {
			return
		}
	}
	t.Errorf("no history in %s", volume)
}
