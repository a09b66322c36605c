package connector

import (
	"fmt"
	"time"

	"github.com/keyward/keyward/dek"
)

// A Welcome is the agent's answer to HELLO.
type Welcome struct {
	Instance  string
	Endpoints string        // of the key service, for messages
	Refresh   time.Duration // how old a state may be before it is asked for again
}

// A Listing is the agent's answer to LIST.
type Listing struct {
	Generation uint64 // changes whenever anything in the list does
	Keyrings   []ListedKeyring
}

func parseHelloReply(b []byte) (Welcome, error) {
	r := body{b: b}
	w := Welcome{Instance: r.str(), Endpoints: r.str(), Refresh: time.Duration(r.u32()) * time.Millisecond}
	return w, r.end()
}

func parseListReply(b []byte) (Listing, error) {
	r := body{b: b}
	l := Listing{Generation: r.u64()}
	for range int(r.u16()) {
		k := ListedKeyring{ID: r.u32(), Latest: r.u32(), State: ListState(r.u8()), Keyring: r.str()}
		n := int(r.u16())
		if r.bad || len(r.b) < 4*n || k.State < ListActive || k.State > ListStale {
			return Listing{}, errFrame
		}
		for i := range n {
			k.Versions = append(k.Versions, r.u32())
			if i > 0 && k.Versions[i] <= k.Versions[i-1] {
				return Listing{}, errFrame
			}
		}
		l.Keyrings = append(l.Keyrings, k)
	}
	if err := r.end(); err != nil {
		return Listing{}, err
	}
	return l, nil
}

// parseGetReply returns the key's bytes inside b.
func parseGetReply(b []byte) (ServerKey, []byte, error) {
	r := body{b: b}
	k := ServerKey{ID: r.u32(), Version: r.u32()}
	n := int(r.u8())
	key := r.take(n)
	if err := r.end(); err != nil || n != dek.KeySize {
		return ServerKey{}, nil, errFrame
	}
	return k, key, nil
}

func parseWaitReply(b []byte) (uint64, error) {
	r := body{b: b}
	g := r.u64()
	return g, r.end()
}

// An AgentError is an ERROR reply: errors.Is finds its class.
type AgentError struct {
	Message string // as it goes into the server's log
	class   error
}

// Error is the agent's message, which is made for the database server's log.
func (e *AgentError) Error() string { return "agent: " + e.Message }

// Unwrap returns the class.
func (e *AgentError) Unwrap() error { return e.class }

func parseError(b []byte) (*AgentError, error) {
	r := body{b: b}
	class, message := r.u16(), r.str()
	if err := r.end(); err != nil || class == 0 || class > classInternal {
		return nil, fmt.Errorf("%w in an error reply", errFrame)
	}
	return &AgentError{Message: message, class: socketError(class)}, nil
}
