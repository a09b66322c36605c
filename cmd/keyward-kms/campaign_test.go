package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
	"github.com/keyward/keyward/hsm/hsmtest"
)

// TestCampaign kills the key service with SIGKILL at random moments during
// create and roll, on a token that survives it (NSS softokn; SoftHSM may lose
// its whole token to a kill). After each restart no acknowledged version is
// missing, none half made is current, a request that was cut off and is sent
// again gives one version or a plain failure, every version unwraps, and no object in the token
// is without a record. KEYWARD_CAMPAIGN_ROUNDS and KEYWARD_CAMPAIGN_SEED say
// how often and repeat a run.
func TestCampaign(t *testing.T) {
	rounds, seed := campaign(t)
	cfg := hsmtest.NSS(t)
	in := newInstallation(t, &cfg, nil)
	c := &crash{installation: in, rand: rand.New(rand.NewPCG(seed, 0)), acked: map[string]dek.Version{}}
	for round := range rounds {
		c.round = round
		c.disturb()
		if err := c.verify(); err != nil {
			t.Fatalf("round %d of %d, seed %d: %v\n%s", round+1, rounds, seed, err, in.log())
		}
	}
	if err := in.unwrapAll(); err != nil {
		t.Fatalf("after %d rounds, seed %d: %v", rounds, seed, err)
	}
	t.Logf("campaign: seed %d, %d rounds, %d versions acknowledged before a kill, %d requests cut off, %d of them failed: none lost",
		seed, rounds, c.before, c.cut, c.failed)
	if rounds >= 30 && (c.before == 0 || c.cut == 0) {
		t.Errorf("the kills came at the wrong moments: %d acknowledged, %d cut off", c.before, c.cut)
	}
}

// campaign returns rounds and seed: 30 in CI, 5 for people in a hurry.
func campaign(t *testing.T) (int, uint64) {
	rounds, seed := 5, uint64(time.Now().UnixNano())
	if os.Getenv("KEYWARD_REQUIRE_INTEGRATION") == "1" {
		rounds = 30
	}
	if n, err := strconv.Atoi(os.Getenv("KEYWARD_CAMPAIGN_ROUNDS")); err == nil {
		rounds = n
	}
	if n, err := strconv.ParseUint(os.Getenv("KEYWARD_CAMPAIGN_SEED"), 10, 64); err == nil {
		seed = n
	}
	return rounds, seed
}

// A crash is the state of a campaign.
type crash struct {
	*installation
	rand  *rand.Rand
	round int

	acked  map[string]dek.Version // request id -> the version it was told
	open   []string               // requests whose outcome is unknown
	before int                    // acknowledged before the kill came
	cut    int                    // cut off by it
	failed int                    // of those, failed at the restart
}

// requests are one create, one roll of the master key, two of the keyring.
func (c *crash) requests() []string {
	return []string{
		fmt.Sprintf("roll-key-%d", c.round), fmt.Sprintf("roll-ring-%d", c.round),
		fmt.Sprintf("create-%d", c.round), fmt.Sprintf("roll-ring-%d-again", c.round),
	}
}

// send makes one request by its id, which says what it is.
func (c *crash) send(ctx context.Context, id string) (dek.Version, error) {
	var n int
	if _, err := fmt.Sscanf(id, "roll-key-%d", &n); err == nil {
		k, err := c.officer.RollKey(ctx, id, "v", "master")
		return k.Current, err
	}
	if _, err := fmt.Sscanf(id, "create-%d", &n); err == nil {
		k, err := c.officer.CreateKey(ctx, connector.NewKey{RequestID: id, Vault: "v", Name: id, Bits: 2048})
		return k.Current, err
	}
	r, err := c.officer.RollKeyring(ctx, id, "v", "ring")
	return r.Current, err
}

// disturb sends the requests one after the other, kills the service somewhere
// among them and starts it again.
func (c *crash) disturb() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	killed := make(chan struct{})
	delay := time.Duration(c.rand.Int64N(int64(700 * time.Millisecond)))
	time.AfterFunc(delay, func() {
		c.kill()
		cancel() // what was in flight is cut off
		close(killed)
	})
	for _, id := range c.requests() {
		if ctx.Err() != nil {
			break // never sent
		}
		v, err := c.send(ctx, id)
		if err != nil {
			c.open = append(c.open, id)
			continue
		}
		c.acked[id] = v
		c.before++
	}
	<-killed
	c.cut += len(c.open)
	c.start()
}

// verify checks everything the service said, and settles what it left open.
func (c *crash) verify() error {
	for _, id := range c.open {
		v, err := c.settle(id)
		if errors.Is(err, dek.ErrPrecondition) { // failed for good, and said so
			c.failed++
			id += "-anew"
			v, err = c.settle(id)
		}
		if err != nil {
			return fmt.Errorf("send %s again: %w", id, err)
		}
		c.acked[id] = v
	}
	c.open = nil
	for id, want := range c.acked {
		got, err := c.send(c.ctx(), id)
		if err != nil {
			return fmt.Errorf("%s, acknowledged as version %d: %w", id, want, err)
		}
		if got < want {
			return fmt.Errorf("%s was version %d, the current one is %d", id, want, got)
		}
	}
	if err := c.versions(); err != nil {
		return err
	}
	status, err := c.officer.Status(c.ctx())
	if err != nil {
		return fmt.Errorf("status: %w", err)
	}
	if len(status.Quarantined) > 0 {
		return fmt.Errorf("%d objects in the token have no record", len(status.Quarantined))
	}
	return nil
}

// settle sends a request again until the service has an answer.
func (c *crash) settle(id string) (dek.Version, error) {
	for {
		v, err := c.send(c.ctx(), id)
		if err == nil || !errors.Is(err, dek.ErrUnavailable) && !errors.Is(err, dek.ErrConflict) {
			return v, err
		}
		if err := c.ctx().Err(); err != nil {
			return 0, err
		}
	}
}

// versions: every request made exactly one version, each enabled, the newest
// current; numbers are not used twice.
func (c *crash) versions() error {
	key, err := c.officer.Key(c.ctx(), "v", "master")
	if err != nil {
		return err
	}
	enabled := 0
	for i, v := range key.Versions {
		if i > 0 && v.Version <= key.Versions[i-1].Version {
			return fmt.Errorf("master versions %d and %d are not ascending", key.Versions[i-1].Version, v.Version)
		}
		if v.State == "enabled" {
			enabled++
		} else if v.Version == key.Current {
			return fmt.Errorf("the current master version %d is %s", v.Version, v.State)
		}
	}
	if want := c.asked("roll-key-") + 1; enabled != want {
		return fmt.Errorf("%d enabled master versions, want %d", enabled, want)
	}
	ring, err := c.officer.Keyring(c.ctx(), "v", "ring")
	if err != nil {
		return err
	}
	enabled = 0
	for _, v := range ring.Versions {
		if v.State == "enabled" {
			enabled++
		} else if v.Version == ring.Current {
			return fmt.Errorf("the current keyring version %d is %s", v.Version, v.State)
		}
	}
	if want := c.asked("roll-ring-") + 1; enabled != want {
		return fmt.Errorf("%d enabled keyring versions, want %d", enabled, want)
	}
	return nil
}

// asked counts the requests of a kind that were acknowledged in the end.
func (c *crash) asked(kind string) int {
	n := 0
	for id := range c.acked {
		if strings.HasPrefix(id, kind) {
			n++
		}
	}
	return n
}
