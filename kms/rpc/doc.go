// Package rpc is the gRPC front door of the key service: TLS 1.3 with client
// certificates for hosts and people, and a socket of the host for root. It
// authenticates, bounds and checks; what may be done is decided behind it.
//
// Every method stands in one table with its operation, deadline, size and
// lane, and passes one chain; a method without a row stops the start. A caller
// learns the class of an error and a request id. The words behind the class
// are sent only where they speak of the caller's own request, and only to
// callers with an identity; everything else goes to our log.
package rpc
