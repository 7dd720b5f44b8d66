// Command testserver is what test pods run beside busybox: an HTTP, TCP and gRPC health endpoint whose health a test can
// switch off. `testserver [-http :8080] [-grpc :9090]`; GET /healthz answers 200, or 503 once /fail was requested;
// GET /count tells how often /healthz was asked; GET /ok repairs it.
package main

import (
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func main() {
	httpAddress := flag.String("http", ":8080", "address of the HTTP endpoint")
	grpcAddress := flag.String("grpc", ":9090", "address of the gRPC health service")
	flag.Parse()

	var failing atomic.Bool
	var asked atomic.Int64
	status := health.NewServer()
	set := func(bad bool) {
		failing.Store(bad)
		if bad {
			status.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
		} else {
			status.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
		}
	}
	http.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		if failing.Load() {
			http.Error(w, "told to fail", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	http.HandleFunc("/fail", func(http.ResponseWriter, *http.Request) { set(true) })
	http.HandleFunc("/ok", func(http.ResponseWriter, *http.Request) { set(false) })
	http.HandleFunc("/count", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, asked.Load()) })
	go func() { log.Fatal(http.ListenAndServe(*httpAddress, nil)) }()

	listener, err := net.Listen("tcp", *grpcAddress)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, status)
	go func() { log.Fatal(server.Serve(listener)) }()

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	<-stop
}
