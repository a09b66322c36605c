package connector_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

// peerEnv makes the test program a database process: a peerQuestion as JSON.
const peerEnv = "KEYWARD_TEST_PEER"

// A peerQuestion is asked by a process of another user.
type peerQuestion struct{ Socket, Instance string }

// A peerAnswer is what that process got.
type peerAnswer struct {
	UID      int
	Instance string // as the agent named it
	Held     bool   // a key came
	Denied   bool   // the agent said no
	Message  string // of an error
}

// runPeerProcess asks the agent for a key and prints what came of it.
func runPeerProcess(text string) int {
	var q peerQuestion
	if err := json.Unmarshal([]byte(text), &q); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	a := peerAnswer{UID: os.Getuid()}
	if err := a.ask(ctx, q); err != nil {
		a.Denied, a.Message = errors.Is(err, dek.ErrDenied), err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(a); err != nil {
		return 1
	}
	return 0
}

func (a *peerAnswer) ask(ctx context.Context, q peerQuestion) error {
	s, err := connector.DialAgent(ctx, q.Socket, connector.NewProcess("mariadb", q.Instance))
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	a.Instance = s.Welcome().Instance
	k, err := s.Get(ctx, connector.ServerKey{ID: 1, Version: 1})
	if err != nil {
		return err
	}
	a.Held = true
	k.Destroy()
	return nil
}

// askAs asks from a process of another user and group.
func (h *host) askAs(t *testing.T, uid, gid uint32, instance string) peerAnswer {
	t.Helper()
	cmd := exec.Command("/proc/self/exe") // that user need not reach the test program's directory
	cmd.Env = []string{peerEnv + "=" + string(must(json.Marshal(peerQuestion{h.cfg.Socket, instance})))}
	cmd.Dir, cmd.Stderr = "/", os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var a peerAnswer
	if err := json.Unmarshal(out, &a); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	if a.UID != int(uid) {
		t.Fatalf("it ran as %d", a.UID)
	}
	return a
}

// The kernel's word on who asks decides, for a second real user: no rule, no
// answer; with a rule, its own instance and no other's.
func TestAgentSecondUser(t *testing.T) {
	needRoot(t, nil)
	const nobody, group, otherGroup = 65534, 65534, 65533
	_, h := newShop(t)
	public := must(os.MkdirTemp("", "keyward-peer"))
	t.Cleanup(func() { _ = os.RemoveAll(public) })
	if err := os.Chmod(public, 0o711); err != nil { //nolint:gosec // the other user has to pass
		t.Fatal(err)
	}
	h.cfg.Socket, h.cfg.SocketGID = filepath.Join(public, "run", "agent.sock"), group
	mine := connector.InstanceRule{UID: uint32(os.Getuid()), Instance: "shop"}

	h.cfg.Instances = []connector.InstanceRule{mine}
	h.start()
	for _, instance := range []string{"", "shop"} {
		if a := h.askAs(t, nobody, group, instance); !a.Denied || a.Held || !strings.Contains(a.Message, "uid 65534") {
			t.Errorf("no rule, asks for %q: %+v", instance, a)
		}
	}
	h.stop()

	h.cfg.Instances = []connector.InstanceRule{mine, {UID: nobody, Instance: "crm"}}
	h.start()
	for instance, want := range map[string]peerAnswer{
		"":     {Instance: "crm", Held: true},
		"crm":  {Instance: "crm", Held: true},
		"shop": {Denied: true},
	} {
		a := h.askAs(t, nobody, group, instance)
		if a.Instance != want.Instance || a.Held != want.Held || a.Denied != want.Denied {
			t.Errorf("asks for %q: got %+v, want %+v", instance, a, want)
		}
	}
	// Root has no more of the other user's than that user of root's.
	if _, err := h.dial(connector.NewProcess("mariadb", "crm")); !errors.Is(err, dek.ErrDenied) {
		t.Errorf("another user's instance: %v", err)
	}
	// Who is not in the socket's group does not get as far as a question.
	if a := h.askAs(t, nobody, otherGroup, "crm"); a.Held || a.Denied || !strings.Contains(a.Message, "permission denied") {
		t.Errorf("of another group: %+v", a)
	}
}
