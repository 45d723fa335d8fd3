package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A root folder in which dpkg installs, without the rest of a system: the scripts of the package run outside of it, as they do in
// the build of an image, and find it by DPKG_ROOT.
type machine struct{ folder string }

func newMachine(t *testing.T) machine {
	t.Helper()
	it := machine{t.TempDir()}
	for _, folder := range []string{"var/lib/dpkg/updates", "var/lib/dpkg/info", "var/log"} {
		if err := os.MkdirAll(filepath.Join(it.folder, folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range []string{"status", "available"} {
		write(t, filepath.Join(it.folder, "var/lib/dpkg", file), "")
	}
	return it
}

func (it machine) dpkg(t *testing.T, args ...string) string {
	t.Helper()
	return run(t, "dpkg", append([]string{"--root=" + it.folder, "--force-script-chrootless", "--force-confold"}, args...)...)
}

func (it machine) has(file string) bool {
	_, err := os.Lstat(filepath.Join(it.folder, file))
	return err == nil
}

func (it machine) path(file string) string { return filepath.Join(it.folder, file) }

// The same package, as a later version.
func later(t *testing.T, deb string) string {
	t.Helper()
	folder := filepath.Join(t.TempDir(), "package")
	run(t, "dpkg-deb", "--raw-extract", deb, folder)
	control := filepath.Join(folder, "DEBIAN", "control")
	write(t, control, strings.Replace(read(t, control), "\nVersion: ", "\nVersion: 9", 1))
	if err := os.Chmod(control, 0o644); err != nil {
		t.Fatal(err)
	}
	built := filepath.Join(t.TempDir(), "later.deb")
	run(t, "dpkg-deb", "--root-owner-group", "-Znone", "--build", folder, built)
	return built
}

func TestPackageInstallsUpgradesWithItsStateAndPurges(t *testing.T) {
	deb := releaseFile(t, "livekit-canary_*_amd64.deb")
	machine := newMachine(t)
	machine.dpkg(t, "--install", deb)
	unit := "usr/lib/systemd/system/livekit-canary.service"
	for _, file := range []string{"usr/bin/livekit-canary", "etc/livekit-canary/canary.toml", unit} {
		if !machine.has(file) {
			t.Fatalf("%s is missing", file)
		}
	}
	if machine.has("etc/systemd/system/multi-user.target.wants/livekit-canary.service") {
		t.Error("it starts before it has settings and a key pair")
	}
	// In this root there is nothing else that the unit needs.
	verify := exec.Command("systemd-analyze", "verify", "--man=no", "--root="+machine.folder, "livekit-canary.service")
	if output, _ := verify.CombinedOutput(); strings.Contains(string(output), "Command livekit-canary is not executable") {
		t.Errorf("systemd finds no binary:\n%s", output)
	}

	// What a person adds and what the service writes.
	settings := strings.Replace(read(t, machine.path("etc/livekit-canary/canary.toml")), "my-agent", "support", 1)
	write(t, machine.path("etc/livekit-canary/canary.toml"), settings)
	for _, file := range []string{"api-key", "api-secret"} {
		write(t, machine.path("etc/livekit-canary/"+file), "secret")
	}
	check := command(machine.path("usr/bin/livekit-canary"), []string{
		"LIVEKIT_CANARY__projects__main__api_key_file=" + machine.path("etc/livekit-canary/api-key"),
		"LIVEKIT_CANARY__projects__main__api_secret_file=" + machine.path("etc/livekit-canary/api-secret"),
	}, "check", "--config", machine.path("etc/livekit-canary/canary.toml"))
	if output, err := check.CombinedOutput(); err != nil || strings.Contains(string(output), "warning") {
		t.Errorf("the settings of the package: %v\n%s", err, output)
	}
	state := "var/lib/private/livekit-canary/history.sqlite3"
	if err := os.MkdirAll(filepath.Dir(machine.path(state)), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, machine.path(state), "state")
	if err := os.Symlink("private/livekit-canary", machine.path("var/lib/livekit-canary")); err != nil {
		t.Fatal(err)
	}

	machine.dpkg(t, "--install", later(t, deb))
	if version := machine.dpkg(t, "--status", "livekit-canary"); !strings.Contains(version, "\nVersion: 9") {
		t.Errorf("no upgrade:\n%s", version)
	}
	kept := func(when string) {
		if !machine.has(state) || read(t, machine.path("etc/livekit-canary/canary.toml")) != settings || !machine.has("etc/livekit-canary/api-secret") {
			t.Errorf("%s loses state, settings or key pair", when)
		}
	}
	kept("an upgrade")
	machine.dpkg(t, "--remove", "livekit-canary")
	kept("a removal")
	if machine.has("usr/bin/livekit-canary") {
		t.Error("a removal leaves the binary")
	}
	machine.dpkg(t, "--purge", "livekit-canary")
	for _, file := range []string{"etc/livekit-canary", "var/lib/livekit-canary", "var/lib/private/livekit-canary", unit} {
		if machine.has(file) {
			t.Errorf("a purge leaves %s", file)
		}
	}
}

// As the unit starts it, from where the package has put it: see the test of the unit for what it then does.
func TestUnitOfThePackageIsThatOfTheRepository(t *testing.T) {
	folder := t.TempDir()
	run(t, "dpkg-deb", "--extract", releaseFile(t, "livekit-canary_*_amd64.deb"), folder)
	shipped := read(t, filepath.Join(folder, "usr/lib/systemd/system/livekit-canary.service"))
	if shipped != read(t, path(t, "deploy", "systemd", "livekit-canary.service")) {
		t.Error("it differs")
	}
}
