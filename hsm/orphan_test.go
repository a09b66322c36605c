package hsm_test

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/hsm"
	"github.com/keyward/keyward/hsm/hsmtest"
)

// orphanEnv makes TestOrphanHelper a service that is about to be killed.
const orphanEnv = "KEYWARD_HSM_ORPHAN"

func TestOrphanHelper(t *testing.T) {
	spec := os.Getenv(orphanEnv)
	if spec == "" {
		t.Skip("runs inside TestChildEndsWithParent")
	}
	part := strings.Split(spec, "|")
	hsmtest.Open(t, hsm.Config{Module: part[0], TokenURI: part[1], PINFile: part[2], Env: part[3:], Child: hsmtest.ChildCommand(t)})
	os.Stdout.WriteString("ready\n")
	io.Copy(io.Discard, os.Stdin)
}

// The service is killed by kill -9: its child ends by itself, and the token is
// there for the next one.
func TestChildEndsWithParent(t *testing.T) {
	cfg := hsmtest.SoftHSM(t, "orphan")
	cmd := exec.Command(cfg.Child[0], "-test.run=^TestOrphanHelper$")
	cmd.Env = append(os.Environ(), orphanEnv+"="+strings.Join(append([]string{cfg.Module, cfg.TokenURI, cfg.PINFile}, cfg.Env...), "|"))
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("helper said %q, %v", line, err)
	}
	lists, err := filepath.Glob("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	var children []string
	for _, l := range lists {
		b, err := os.ReadFile(l)
		if err != nil {
			t.Fatal(err)
		}
		children = append(children, strings.Fields(string(b))...)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if len(children) != 1 {
		t.Fatalf("children: %q", children)
	}
	tick, limit := time.NewTicker(5*time.Millisecond), time.After(5*time.Second)
	defer tick.Stop()
	for running(children[0]) {
		select {
		case <-tick.C:
		case <-limit:
			t.Fatal("the child outlived its parent by 5 s")
		}
	}
	hsmtest.Open(t, cfg)
}

// running reports whether the process is there and not a zombie.
func running(pid string) bool {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return false
	}
	_, state, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(state, "Z")
}
